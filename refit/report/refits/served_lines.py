"""The lines on a running engine: how it holds its weights, how long it paused, what it generates."""

from __future__ import annotations

from statistics import median

from refit.config.registry import ENGINES
from refit.results.refit import EngineResult
from refit.results.serving import Served


def served_line(name: str, served: Served) -> str:
    """The result of `--check-forward` for a running engine."""
    check, title = served.check, ENGINES[name].title
    if check is None:
        return ""
    if check.fault is None and check.skipped is not None:
        return f"Forward check ({title}) waived: {check.skipped}"
    right = check.num_tokens - check.num_wrong
    wrong = f"; the first difference is at {check.first_wrong}" if check.first_wrong else ""
    excluded = f"; {check.num_excluded} left out for near ties of experts" if check.num_excluded else ""
    difference = "not finite" if check.difference is None else f"{check.difference:.2g} nats"
    return (
        f"Forward check ({title}) {'FAILED' if check.fault else 'passed'}: {right} of {check.num_tokens} tokens of the "
        f"running engine agree, of prompts and generated, for {check.num_sets} sets of weights in turn{wrong}; largest "
        f"difference {difference}, tolerance {check.tolerance:g}{excluded}: {check.reference}"
    )


def engine_lines(name: str, engine: EngineResult) -> list[str]:
    """What runs and how it holds its weights, and its pause by phase; nothing without a running engine."""
    served = engine.served
    if served is None:
        return []
    lines = [
        f"Engine ({ENGINES[name].title}): vLLM {served.version} with {served.num_workers} "
        f"worker{'s' if served.num_workers > 1 else ''}: {len(served.live)} kinds of parameters written live, "
        f"{len(served.copied)} copied and {len(served.packed)} packed at commit"
    ]
    timed = [sample for sample in engine.samples if not sample.warmup]
    if served.pause_s is not None and engine.median_s is not None:
        phases = {phase: median(sample.around_s.get(phase, 0.0) for sample in timed) for phase in timed[0].around_s}
        parts = [f"{phase} {1e3 * seconds:.2f}" for phase, seconds in phases.items()]
        parts.insert(1, f"refit {1e3 * engine.median_s:.2f}")
        kinds = ", ".join(f"{kind} {1e3 * seconds:.2f}" for kind, seconds in served.commit_s.items())
        commit = f"; commit by layers: {kinds}" if kinds else ""
        lines.append(f"Engine pause: {1e3 * served.pause_s:.2f} ms median ({', '.join(parts)}{commit})")
    if apart := timed[0].apart_s if timed else {}:
        parts = [f"{phase} {1e3 * median(sample.apart_s[phase] for sample in timed):.2f}" for phase in apart]
        lines.append(f"Before the pause, not counted in it ({ENGINES[name].title}): {', '.join(parts)} ms median")
    compared = sum(sample.engine_compared for sample in engine.samples)
    if compared:
        lines.append(
            f"In the engine: every weight's memory has the digest of what was compared; {compared:,} live elements "
            f"compared, {engine.num_wrong_in_engine:,} wrong"
        )
    return lines
