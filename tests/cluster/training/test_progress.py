"""What a person sees: lines where the output is a file, a bar on a terminal."""

from __future__ import annotations

import io
from time import monotonic

import pytest
from rich.console import Console

from cluster.training.progress import Bar, Lines, headline, make_progress

METRICS = {
    "step": 3,
    "reward/mean": 0.51239,
    "kl/mean": 0.001234,
    "throughput/tokens_per_s": 1234.5,
    "time/step_s": 2.347,
}


def console(*, terminal: bool, width: int = 200) -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, force_terminal=terminal, width=width, color_system=None), output


@pytest.mark.parametrize(("terminal", "kind"), [(True, Bar), (False, Lines)])
def test_a_bar_only_on_a_terminal(terminal: bool, kind: type[object]) -> None:
    progress = make_progress(console(terminal=terminal)[0])
    progress.close()
    assert type(progress) is kind


def test_the_headline_shows_what_there_is_in_a_fixed_order() -> None:
    assert headline(METRICS) == "reward 0.512  kl 0.0012  tok/s 1234  s/step 2.35"
    assert headline({"step": 0, "eval/reward_mean": 0.25}) == "eval 0.250"
    assert headline({}) == ""


def test_lines() -> None:
    screen, output = console(terminal=False, width=40)
    lines = make_progress(screen)
    for phase in ("start", "start", "sync"):
        lines.phase(phase)
    lines.start(steps=5, done=2)
    lines.phase("generate")  # once steps come, phases are not worth a line
    lines.step(METRICS)
    lines.note("[not markup] " + "long " * 20)
    lines.close()
    assert output.getvalue().splitlines() == [
        "start …",
        "sync …",
        "training: 5 steps, resumed after step 2",
        "step 3/5  reward 0.512  kl 0.0012  tok/s 1234  s/step 2.35",
        "[not markup] " + "long " * 20,
    ]


def test_a_fresh_run_is_not_resumed() -> None:
    screen, output = console(terminal=False)
    make_progress(screen).start(steps=5, done=0)
    assert output.getvalue() == "training: 5 steps\n"


def test_lines_about_a_wait_have_its_seconds_and_stop_with_it() -> None:
    screen, output = console(terminal=False)
    lines = Lines(screen, clock=lambda: 112.4)
    lines.waiting({"loading learner 0": 108.0, "loading generator 0 (vLLM)": 100.0})
    lines.remind()
    lines.waiting({})
    lines.remind()
    lines.close()
    assert output.getvalue() == "loading generator 0 (vLLM) 12 s, loading learner 0 4 s …\n"


def test_the_bar_shows_what_is_waited_for_in_place_of_the_phase() -> None:
    screen, output = console(terminal=True)
    bar = make_progress(screen)
    bar.phase("start roles")
    bar.waiting({"loading learner 0": monotonic() - 12.0})
    bar.note("redrawn")
    bar.close()
    assert "loading learner 0 12 s …" in output.getvalue()


def test_the_bar() -> None:
    screen, output = console(terminal=True)
    bar = make_progress(screen)
    bar.phase("sync")
    bar.start(steps=5, done=2)
    bar.step(METRICS)
    bar.phase("generate")
    bar.note("[not markup]")
    bar.close()
    last = [line for line in output.getvalue().splitlines() if "/5" in line][-1]
    assert "3/5" in last
    assert "generate" in last
    assert headline(METRICS) in last
    assert "[not markup]" in output.getvalue()
