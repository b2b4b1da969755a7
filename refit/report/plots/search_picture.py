"""The picture of a search: lower bound against memory, with the Pareto set."""

from __future__ import annotations

from pathlib import Path

from refit.config.clusters import Cluster
from refit.predict.findings import Findings
from refit.report.plots.style import check_available
from refit.results.plain import plain

NUM_LABELS = 8


def draw(findings: Findings, cluster: Cluster, path: Path) -> Path:
    """Write the picture, in the format that the path's suffix names. Raises UnavailableError without matplotlib."""
    check_available()
    from matplotlib.figure import Figure

    drawn = [(index, one, one.bound) for index, one in enumerate(findings.found) if one.bound is not None]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(
        [bound.seconds for _, _, bound in drawn], [one.memory_bytes / 2**30 for _, one, _ in drawn], s=18, color="0.65"
    )
    front = [(one, bound) for index, one, bound in drawn if index in findings.pareto]
    seconds = [bound.seconds for _, bound in front]
    gib = [one.memory_bytes / 2**30 for one, _ in front]
    axes.step(seconds, gib, where="post", marker="o", color="black", label="no other is as good in both")
    for (one, _), x, y in zip(front[:NUM_LABELS], seconds, gib, strict=False):
        equal = sum((other.bound_s, other.memory_bytes) == (one.bound_s, one.memory_bytes) for _, other, _ in drawn)
        text = plain(one.destination) + (f" and {equal - 1} more" if equal > 1 else "")
        axes.annotate(text, (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8)
    if cluster.gpu_memory_bytes is not None:
        axes.axhline(cluster.gpu_memory_bytes / 2**30, color="0.4", linestyle="--", label="memory of a GPU")
    axes.set(
        xlabel="lower bound of the refit (s)",
        ylabel="memory of the fullest GPU (GiB)",
        title=f"{len(drawn)} layouts on {plain(cluster.name)}: predicted, not measured",
    )
    axes.legend(loc="best", fontsize=8)
    figure.savefig(path, dpi=150)
    return path
