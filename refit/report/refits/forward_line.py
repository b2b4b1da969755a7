"""The line on a check of the forward pass."""

from __future__ import annotations

from refit.config.registry import ENGINES
from refit.results.refit import ForwardCheck


def forward_line(name: str, check: ForwardCheck, weights: str = "") -> str:
    """The result of `--check-forward`, or of the same check with `weights` other than the oracle's."""
    title = ", ".join(filter(None, (ENGINES[name].title, weights)))
    if check.fault is None and check.skipped is not None:
        return f"Forward check ({title}) waived: {check.skipped}"
    agree = f"{100 * (check.agreement or 0):.0f} % of {check.num_tokens} tokens agree in {check.num_layers} layers"
    details = [f"{agree} and in the logits, in float32"]
    details += [f"the first difference is at {check.first_wrong}"] if check.first_wrong else []
    differences = [f"{_number(check.layer_difference)} of what a layer adds"]
    differences += [f"{_number(check.router_difference)} of routers' scores"] if check.num_experts else []
    details.append(f"largest difference {' and '.join(differences)}, tolerance {_number(check.tolerance)}")
    details += [f"{check.num_reached} of {check.num_experts} experts reached"] if check.num_experts else []
    details += [f"{check.num_excluded} results left out for near ties of experts"] if check.num_excluded else []
    return f"Forward check ({title}) {'FAILED' if check.fault else 'passed'}: {'; '.join(details)}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2g}"
