"""Chat templates of strangers: what they may do, and that they come to an end."""

import datetime
import time

import pytest

from gemma_nb.text.sandbox import Program, TemplateFault

NOW = datetime.datetime(2031, 2, 3)
MESSAGES = [{"role": "user", "content": "<b> ü"}, {"role": "assistant", "content": "Yes"}]


def render(source, **values):
    return Program(source).render(NOW, {"messages": MESSAGES, **values})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<b> ü"}'),  # no HTML
        ("{{ messages[0].content }}", "<b> ü"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "user"),
        ("{% for m in messages[::-1] %}{{ loop.index }}{{ m.role[0] }}{% endfor %}", "1a2u"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),  # trim_blocks, lstrip_blocks
        ("{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}"
         "{{ n.x }}", "2"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') ~ f('b') }}", "[a][b]"),
        ("{{ strftime_now('%Y-%m-%d') }}", "2031-02-03"),
        ("{{ undefined_name }}{{ messages[0].nothing }}", ""),
        ("{{ messages | map(attribute='role') | join(', ') | upper }}", "USER, ASSISTANT"),
        ("{{ 'a,b'.split(',')[-1] }}{{ '-' * 3 }}{{ 7 % 4 }}", "b---3"),
        ("{{ '%s and %s' | format('a', 'b') }}{{ '{}'.format(1) }}", "a and b1"),
    ],
)  # fmt: skip
def test_templates_are_rendered_as_transformers_does(source, expected):
    """Values: of transformers 5.24, `render_jinja_template`."""
    assert render(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10**10 }}",
        "{{ 'a' * 10000000000 }}",
        "{{ [0] * 10000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10000000000, 1) }}",
        "{{ '%10000000000d' | format(1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10000000000) }}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ 'a' | center(10000000000) }}",
        "{{ 1 | round(10000000000) }}",
        "{{ [1] | batch(10000000000, 0) | list }}",
        "{{ messages | tojson(indent=10000000000) }}",
        "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
        "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
        "{{ (['a' * 1000000] * 1000000) | join }}",
        "{% set n = namespace(x='a') %}{% for i in range(50) %}{% set n.x=n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(50) %}{% set n.x=n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}"
        "{% endset %}{% set n.x = y %}{% endfor %}",
        "{{ range(99999) | list | map('center', 9999) | join }}",
        "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
        "{{ lipsum(n=1000000) }}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        "{% endfor %}",
        " " * (1 << 21),
    ],
)
def test_what_is_too_much_or_out_of_bounds_ends_soon(source):
    began = time.monotonic()
    with pytest.raises(TemplateFault):
        render(source)
    assert time.monotonic() - began < 20  # some 0.5 s at most; on a busy machine, too
