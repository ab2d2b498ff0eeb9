"""Interventions in files: every kind there and back, and damaged ones."""

import json
import zipfile

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import gemma_nb as gnb
from gemma_nb.chat.saving import interventions
from gemma_nb.errors import ConversationError, ConversationWarning, InterventionWarning
from gemma_nb.interventions import Intervention, Interventions, Where

_RNG = np.random.default_rng(0)


def _kinds(trace):
    """Each kind in each of its forms, for the tiny model."""
    row = np.full((1, 4), 0.25, np.float32)
    return [
        gnb.AblateHeads({0: [1], 2: [0, 1]}),
        gnb.AblateHeads({1: [0]}, "mean", reference=trace, positions=[3, 5]),
        gnb.AblateHeads({1: [0]}, "resample", reference=trace, positions=slice(2, 9)),
        gnb.AblateMLP([0, 2], "mean", reference=trace),
        gnb.AblateMLP(1),
        gnb.ScaleHeads({0: {0: 0.5}, 1: {1: 2.0}}, positions=slice(4, None)),
        gnb.Patch.from_trace(trace, "residual", 1, [2, 3]),
        gnb.Patch.from_trace(trace, "z", 1, [2, 3], heads=[1]),
        gnb.Patch("embed", None, 4, jnp.ones(32, jnp.bfloat16)),
        gnb.Steer(1, _RNG.normal(size=32), scale=4.0, positions=[6]),
        gnb.EditNeuron(1, 12, 3.0, method="add"),
        gnb.KnockOut(1, queries=[9], keys=[0, 1]),
        gnb.KnockOut(0, [1]),
        gnb.ReplaceAttention(1, 0, row, queries=[5]),
        gnb.ForceToken(3, 7),
    ]


@pytest.fixture(scope="module")
def kinds(tiny_model):
    model, tokenizer = tiny_model
    ids = tokenizer.encode("abcdefghij", bos=True)
    return _kinds(gnb.trace(model, ids, sites=()))


@pytest.fixture
def chat(tiny_model):
    sampling = gnb.Sampling(temperature=1.0, seed=3, max_new_tokens=6)
    return gnb.ChatSession(*tiny_model, template="gemma", sampling=sampling, cache_length=128)


def _same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float64), np.asarray(y, np.float64))


def test_every_kind_comes_back_as_it_was(kinds):
    assert {type(item).__name__ for item in kinds} == set(interventions._ARRAYS)
    under = Interventions(tuple(kinds), jnp.int32(5))
    data, columns = interventions.encode(under)
    columns = safetensors.numpy.load(safetensors.numpy.save(columns))
    found = interventions.decode(json.loads(json.dumps(data)), columns, "under")
    _same(found, under)
    assert found.describe() == under.describe()


def test_a_loaded_chat_goes_on_under_the_same_interventions(chat, tiny_model, tmp_path):
    chat.chat("Hi")
    turn = chat.intervene(gnb.Steer(1, _RNG.normal(size=32), scale=20.0), at=2)
    chat.save(tmp_path / "a.gnb")
    loaded = gnb.ChatSession.load(tmp_path / "a.gnb", *tiny_model)
    again = loaded.turns[-1]
    assert again.interventions == turn.interventions
    np.testing.assert_array_equal(
        loaded.trace(again, sites=("final",)).final, chat.trace(turn, sites=("final",)).final
    )
    resumed, expected = loaded.fork(3, turn=again), chat.fork(3, turn=turn)
    assert resumed.interventions == turn.interventions
    assert [r.token_id for r in resumed.tokens] == [r.token_id for r in expected.tokens]
    # A second generation of the file holds them, too.
    loaded.save(tmp_path / "b.gnb")
    third = gnb.ChatSession.load(tmp_path / "b.gnb", *tiny_model)
    assert third.trace(third.turns[-1]).interventions == turn.interventions


def test_what_a_reply_did_not_reach_is_said_when_it_ends(chat, tiny_model):
    model, tokenizer = tiny_model
    settings = {"template": "gemma", "sampling": chat.sampling, "cache_length": 256}
    beyond = model.intervene(gnb.Steer(1, jnp.ones(32), positions=[500]))
    with pytest.warns(InterventionWarning, match=r"room for 256 tokens \(cache_length\)"):
        gnb.ChatSession(beyond, tokenizer, **settings)
    late = gnb.ChatSession(
        model.intervene(gnb.Steer(1, jnp.ones(32), positions=[120])), tokenizer, **settings
    )
    with pytest.warns(InterventionWarning, match="position 120 is not reached"):
        turn = late.chat("Hi")
    assert "position 120 is not reached; the text has" in turn.finish_detail
    late.trace(turn, sites=())  # the conversation goes on: nothing to warn of
    with pytest.warns(InterventionWarning, match="position 120 is not reached"):
        (sampled,) = late.sample("Hi", n=1)
    assert "position 120 is not reached" in sampled.finish_detail
    reached = late.chat("x" * 110)
    assert "not reached" not in reached.finish_detail


def test_they_are_in_the_journal(chat, tiny_model, tmp_path):
    path = tmp_path / "a.gnb"
    chat.autosave = path
    chat.chat("Hi")
    turn = chat.intervene(gnb.AblateHeads({1: [0]}), at=1)
    chat.autosave = None
    loaded = gnb.ChatSession.load(path, *tiny_model)
    assert loaded.trace(loaded.turns[-1]).interventions == turn.interventions


@flax.struct.dataclass
class Shift(Intervention):
    """As a user writes one."""

    layer: int
    vector: jax.Array
    where: Where
    sign: str = flax.struct.field(pytree_node=False, default="plus")

    @property
    def sites(self):
        return ("residual",)

    def apply(self, value, layer, positions, keys):
        change = self.vector if self.sign == "plus" else -self.vector
        acts = self.where(positions) & (self.layer == layer)
        return jnp.where(acts[..., None], value + change, value)

    def __str__(self):
        return f"shift layer {int(self.layer)}"


def test_a_class_of_the_users_own_is_kept_and_read_where_it_is_given(chat, tiny_model, tmp_path):
    chat.chat("Hi")
    shift = Shift(1, 20 * jnp.ones(32), Where.of([19, 20]), "minus")
    turn = chat.intervene(shift, gnb.AblateMLP(0), at=1)
    paths = [tmp_path / "a.gnb", tmp_path / "b.gnb"]
    chat.save(paths[0])
    with pytest.warns(ConversationWarning, match=r"made under Shift.*interventions=\[Shift\]"):
        unread = gnb.ChatSession.load(paths[0], *tiny_model)
    assert unread.turns[-1].interventions == turn.interventions
    with pytest.raises(ValueError, match=r"under shift layer 1, .*interventions=\[Shift\]"):
        unread.trace()
    assert not unread.regenerate().interventions  # the conversation goes on all the same
    unread.save(paths[1])  # nothing is lost by it
    for path in paths:
        loaded = gnb.ChatSession.load(path, *tiny_model, interventions=[Shift])
        again = loaded.tree.find(turn.id).turn
        assert again.interventions == turn.interventions
        assert loaded.tree.interventions[turn.id].items[0].sign == "minus"
        np.testing.assert_array_equal(
            loaded.trace(again, sites=("final",)).final, chat.trace(turn, sites=("final",)).final
        )


def test_a_class_that_changed_meanwhile_is_refused(chat, tiny_model, tmp_path):
    chat.chat("Hi")
    chat.intervene(Shift(1, jnp.ones(32), Where.of(None)), at=1)
    chat.save(tmp_path / "a.gnb")
    other = type("Shift", (gnb.AblateMLP,), {})
    with pytest.raises(ConversationError, match="had layer, sign, vector, where when"):
        gnb.ChatSession.load(tmp_path / "a.gnb", *tiny_model, interventions=[other])


def test_what_no_file_can_hold_is_kept_by_description(chat, tiny_model, tmp_path):
    @flax.struct.dataclass
    class Own(Shift):
        """With something that is no array and no plain value."""

        function: object = flax.struct.field(pytree_node=False, default=abs)

    chat.chat("Hi")
    turn = chat.intervene(Own(1, jnp.ones(32), Where.of(None)), at=1)
    chat.save(tmp_path / "a.gnb")
    loaded = gnb.ChatSession.load(tmp_path / "a.gnb", *tiny_model)
    assert loaded.turns[-1].interventions == turn.interventions
    with pytest.raises(ValueError, match="not kept with this conversation"):
        loaded.trace()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda item, _: item.update(kind="Popen"), "expected one of AblateHeads"),
        (lambda item, _: item.update(fixed={}), "expected method"),
        (lambda item, _: item.update(fixed={"method": "eval"}), "not one of those"),
        (lambda item, _: item.update(fixed={"method": ["zero"]}), "not one of those"),
        (lambda item, _: item.update(arrays=None), "expected names"),
        (lambda _, columns: columns.pop("under.0.heads"), "expected the array under.0.heads"),
        (lambda _, c: c.update({"under.0.heads": np.zeros(9, np.int32)}), "axis M is 9 long"),
        (lambda _, c: c.update({"under.0.heads": np.zeros(3, np.float32)}), "expected i M"),
        (lambda _, c: c.update({"under.0.values": np.zeros(3, np.float32)}), "expected f M P H"),
        (lambda _, c: c.update({"under.0.where.listed": np.zeros((2, 2), int)}), "expected i X"),
        (lambda _, c: c.update({"under.0.layers": np.zeros(5000, np.int32)}), "more than 4096"),
    ],
)
def test_damage_is_said(kinds, change, message):
    data, columns = interventions.encode(Interventions((kinds[0],), jnp.int32(0)))
    change(data["items"][0], columns)
    with pytest.raises(ValueError, match=message):
        interventions.decode(data, columns, "under.2")


@pytest.mark.parametrize("data", [None, [], {}, {"start": 0, "items": []}, {"start": -1}])
def test_no_interventions_at_all_are_damage(data):
    with pytest.raises(ValueError, match=r"under\.2"):
        interventions.decode(data, {}, "under.2")


def test_a_damaged_file_is_a_conversation_error(chat, tiny_model, tmp_path):
    chat.chat("Hi")
    turn = chat.intervene(gnb.EditNeuron(1, 12, 3.0), at=1)
    chat.save(tmp_path / "a.gnb")
    for change, error in (
        ({"kind": "Nothing"}, ConversationError),
        ({"layer": 99}, ValueError),
    ):
        with zipfile.ZipFile(tmp_path / "a.gnb") as file:
            members = {name: file.read(name) for name in file.namelist()}
        structure = json.loads(members["conversation.json"])
        if "kind" in change:
            structure["under"][str(turn.id)]["items"][0] |= change
        else:
            name = f"evidence/{turn.id}.safetensors"
            columns = safetensors.numpy.load(members[name])
            columns["under.0.layer"] = np.array(change["layer"], np.int32)
            members[name] = safetensors.numpy.save(columns)
        members["conversation.json"] = json.dumps(structure).encode()
        with zipfile.ZipFile(tmp_path / "b.gnb", "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
        with pytest.raises(error):
            gnb.ChatSession.load(tmp_path / "b.gnb", *tiny_model).trace()
