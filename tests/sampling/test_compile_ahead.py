"""Compilation ahead of need: what fails there is nobody's error yet."""

import logging
import threading

import jax

from gemma_nb.sampling import compile_ahead
from gemma_nb.sampling.compile_ahead import COMPILING
from gemma_nb.sampling.decode import Decoder
from gemma_nb.sampling.programs import StepProgram
from gemma_nb.sampling.settings import Sampling
from tests.sampling.streams import GREEDY, random_ids


def joined():
    for thread in threading.enumerate():
        if thread.name == compile_ahead.COMPILING:
            thread.join()


def test_a_job_that_fails_is_logged_and_the_others_are_run(caplog, capfd):
    done = []

    def fails():
        raise TypeError("no promotion path")

    with caplog.at_level(logging.INFO, logger=compile_ahead.__name__):
        compile_ahead.begin([lambda: done.append(1), fails, lambda: done.append(2)])
        joined()
    assert done == [1, 2]
    assert "compiling ahead of need failed" in caplog.text
    assert "no promotion path" in caplog.text
    assert capfd.readouterr().err == ""  # no traceback of a thread


def test_decoding_goes_on_where_the_next_size_could_not_be_compiled_ahead(
    tiny_model, score, monkeypatch
):
    monkeypatch.setattr("gemma_nb.sampling.cache.SIZES", (48, 96))
    compile_ahead.begun.cache_clear()  # of other tests
    decoder = Decoder(tiny_model[0], limit=90, top_k=5)
    tried = []

    def refuse(*args):
        tried.append(args)
        raise TypeError("no promotion path")

    monkeypatch.setattr(StepProgram, "compile", refuse)
    decoder.prefill(decoder.begin([7] * 20, Sampling(temperature=0, seed=0)))
    while decoder._cache.size == 48:
        evidence = decoder.step()
    joined()
    assert len(tried) == 5  # the next prompt's programs, and those of the next size
    likeliest = score(decoder.ids)[-1].argmax()
    assert int(evidence.token) == int(likeliest)


def test_python_waits_for_it_whoever_began_it():
    """A thread that is cut off inside of XLA takes the whole process down."""
    daemons = []

    def job():
        daemons.append(threading.current_thread().daemon)

    starter = threading.Thread(target=compile_ahead.begin, args=([job],), daemon=True)
    starter.start()
    starter.join()
    joined()
    assert daemons == [False]


def test_the_next_size_is_compiled_before_it_is_needed(tiny_model, monkeypatch, caplog):
    monkeypatch.setattr("gemma_nb.sampling.cache.SIZES", (48, 96, 192))
    compile_ahead.begun.cache_clear()  # of other tests
    decoder = Decoder(tiny_model[0], limit=150, top_k=5)
    compiled = []
    compile_ = StepProgram.compile

    def noted(program, cache, *rest):
        compiled.append((cache.size, threading.current_thread().name))
        compile_(program, cache, *rest)

    monkeypatch.setattr(StepProgram, "compile", noted)
    decoder.prefill(decoder.begin(random_ids(20), GREEDY))
    for _ in range(5):
        decoder.step()
    for thread in threading.enumerate():
        if thread.name == COMPILING:
            thread.join()
    # The next prompt's, and those of the next size.
    assert sorted(compiled) == [(48, COMPILING)] * 2 + [(96, COMPILING)] * 3
    assert decoder._cache.size == 48
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        while decoder._cache.size == 48:
            decoder.step()
        decoder.step()
    assert "Compiling jit(_widen)" in caplog.text
    main = [r.getMessage() for r in caplog.records if r.threadName == "MainThread"]
    assert not [message for message in main if "jit(step" in message]
    for _ in range(40):
        decoder.step()
    assert decoder._cache.size == 96


def test_warming_up_compiles_the_next_size_too(tiny_model, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        StepProgram, "compile", lambda program, cache, *rest: sizes.append(cache.size)
    )
    compile_ahead.begun.cache_clear()  # of other tests
    for _ in range(2):  # a second stream of the model finds it done
        decoder = Decoder(tiny_model[0], limit=1024, top_k=5)
        decoder.compile()
        for thread in threading.enumerate():
            if thread.name == COMPILING:
                thread.join()
    assert sizes == [256] * 2 + [512] * 3
    assert decoder.ids == []
