"""Converts result and sweep files of older schema versions to the current one. Plain JSON values in and out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

RESULT_VERSION = 4
SWEEP_VERSION = 3

MEGATRON_SERVICES = {"nccl": "nccl", "nvshmem": "nvshmem", "gloo": "gloo", "shm": "gloo"}
"""What Megatron-Core's own refit ran over beside each method, in runs that did not record it; `nccl` beside others."""

FORMATS_WITH_OPTIONS = ("fsdp2", "autotp", "vllm")
"""Result files of version 3 and sweep files of version 2 had a field for the settings of each."""

OPTIONS_OF_METHODS = {
    "shm": {"buffers": "one_sided_buffers"},
    "nvshmem": {"buffers": "one_sided_buffers", "force_put": "nvshmem_force_put"},
    "nixl": {"backend": "nixl_backend"},
}
"""Method -> setting -> the field of a scenario that those versions had for it, whatever the method."""

AUTO = "auto"


def upgraded_result(content: object) -> dict[str, Any]:
    """Convert a result file's content. Raises ValueError for other content or an unknown version."""
    if not isinstance(content, dict) or "run_id" not in content or "scenarios" in content:
        raise ValueError("it holds no result")
    version = content.get("schema_version", RESULT_VERSION)
    if version == RESULT_VERSION:
        return content
    if version not in (1, 2, 3):
        raise ValueError(f"schema version {version!r} is not one of 1 to {RESULT_VERSION}")
    with _reading(f"schema version {version}"):
        result = _with_transports(content if version == 3 else _result(content))
        return {**result, **_with_options(result), "schema_version": RESULT_VERSION}


def _with_options(holder: dict[str, Any]) -> dict[str, Any]:
    """The scenario and the sides of a result or a planned scenario, with the settings of formats and methods in one
    field each. Decoding names what is malformed; here it stays as it is."""
    scenario = holder.get("scenario")
    sides: dict[str, Any] = {name: _side(holder[name]) for name in ("source", "destination") if name in holder}
    if not isinstance(scenario, dict):
        return sides
    known = {name: fields for name, fields in OPTIONS_OF_METHODS.items() if scenario.get("method") in (name, AUTO)}
    methods = {
        name: {option: scenario[field] for option, field in fields.items() if field in scenario}
        for name, fields in known.items()
    }
    old = {field for fields in OPTIONS_OF_METHODS.values() for field in fields.values()}
    kept = {name: value for name, value in scenario.items() if name not in old}
    inner = {name: _side(kept[name]) for name in ("source", "destination") if name in kept}
    return {**sides, "scenario": {**kept, **inner, "method_options": methods}}


def _side(side: Any) -> Any:
    if not isinstance(side, dict):
        return side
    kept = {name: value for name, value in side.items() if name not in FORMATS_WITH_OPTIONS}
    return {**kept, "options": side.get(side.get("format", "megatron"))}


def _with_transports(content: dict[str, Any]) -> dict[str, Any]:
    """Add to each engine what moved its bytes, as far as that follows, where the file is of before it was recorded.

    Decoding names what is malformed; here it stays as it is.
    """
    scenario, measurements = content.get("scenario"), content.get("measurements")
    method = scenario.get("method") if isinstance(scenario, dict) else None
    if not isinstance(method, str) or not isinstance(measurements, dict) or "refit" not in measurements:
        return content
    return {**content, "measurements": {**measurements, "refit": _refit_with_transports(measurements["refit"], method)}}


def _refit_with_transports(refit: object, method: str) -> object:
    if not isinstance(refit, dict) or not isinstance(engines := refit.get("engines"), dict):
        return refit
    known = {"refit": method, "megatron": MEGATRON_SERVICES.get(method, "nccl"), "nccl-m2n": "nccl"}
    return {
        **refit,
        "engines": {
            name: {"transport": known.get(name), **engine} if isinstance(engine, dict) else engine
            for name, engine in engines.items()
        },
        **({"rearranged": _refit_with_transports(refit["rearranged"], method)} if "rearranged" in refit else {}),
    }


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Turn missing or mistyped fields of an older file into a ValueError that names them."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{place}: field {error} is missing") from None
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{place}: {error}") from None


def _result(content: dict[str, Any]) -> dict[str, Any]:
    common = ("run_id", "status", "exit_code", "failure", "started", "finished", "environment")
    kept = {name: content[name] for name in common if content.get(name) is not None}
    if "failure" in kept:
        kept["failure"] = {**kept["failure"], "message": kept["failure"].get("message") or ""}
    old = content.get("scenario") or {}
    if not old and not content.get("engines"):
        return {**kept, "schema_version": RESULT_VERSION}
    return {
        **kept,
        "schema_version": RESULT_VERSION,
        "world_size": old.get("world_size"),
        "device": old.get("device"),
        "scenario": _scenario(old, content.get("layouts") or {}),
        "measurements": {"refit": _refit(content, old)},
    }


def _scenario(old: dict[str, Any], layouts: dict[str, Any]) -> dict[str, Any] | None:
    """Versions 1 and 2 stored the layouts beside the scenario, and the dtype in the model."""
    if not {"source", "destination"} <= layouts.keys():
        return None
    model = dict(old["model"]) if isinstance(old.get("model"), dict) else None
    dtype = (model or {}).pop("dtype", None)
    same = {"mode", "method", "num_warmup", "num_iterations", "verify", "check_forward", "staging_bytes", "timeout_s"}
    same |= {"model_name", "model_provider", "notes", "recorded", "nvshmem_force_put"}
    engine = old.get("engine", "refit")
    sides = {
        name: {
            "layout": layouts[name],
            "format": "megatron",
            "dtype": dtype,
            "transformer_impl": old.get("transformer_impl", "local"),
        }
        for name in ("source", "destination")
    }
    return {
        **{name: value for name, value in old.items() if name in same and value is not None},
        **sides,
        "model": model,
        "engines": ["refit", "megatron"] if engine == "both" else [engine],
        "one_sided_buffers": old.get("nvshmem_buffers", "ring"),
    }


def _refit(content: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    bound = content.get("bound")
    facts = {name: old[name] for name in ("num_parameters", "num_tensors", "dtypes") if name in old}
    return {
        "status": content.get("status", "running"),
        "model": facts if len(facts) == 3 else None,
        "plan": _plan(content.get("bytes") or {}, content.get("plan") or {}),
        "bound": {"cluster": bound["cluster"], "seconds": bound["lower_bound_s"], "limited_by": bound["limited_by"]}
        if bound
        else None,
        "engines": {name: _engine(engine) for name, engine in (content.get("engines") or {}).items()},
    }


def _plan(moved: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any] | None:
    if not moved:
        return None
    by_rank = ("local_by_rank", "source_weights_by_rank", "destination_weights_by_rank")
    return {
        **{f"{name}_bytes": moved[name] for name in ("payload", "wire", "local")},
        **{name: moved[name] for name in ("sent_by_rank", "received_by_rank")},
        **{name: moved.get(name, {}) for name in by_rank},
        "num_transfers": plan.get("num_transfers", 0),
        "digest": plan.get("digest") or "",
        "casts": plan.get("casts", {}),
    }


def _engine(engine: dict[str, Any]) -> dict[str, Any]:
    """Older versions stored an empty mapping for a summary that does not exist."""
    return {**engine, "summary": engine.get("summary") or None}


def upgraded_sweep(content: object) -> dict[str, Any]:
    """Convert a sweep file's content. Raises ValueError for other content or an unknown version."""
    if not isinstance(content, dict) or "scenarios" not in content:
        raise ValueError("it holds no scenarios")
    version = content.get("schema_version")
    if version == SWEEP_VERSION:
        return content
    if version not in (1, 2):
        raise ValueError(f"schema version {version!r} is not one of 1 to {SWEEP_VERSION}")
    scenarios = []
    with _reading(f"schema version {version}"):
        for number, entry in enumerate(content["scenarios"], 1):
            with _reading(f"schema version {version}, scenario {number}"):
                planned = _planned(entry, content.get("cluster")) if version == 1 else entry
                scenarios.append({**planned, **_with_options(planned)})
    return {**content, "schema_version": SWEEP_VERSION, "scenarios": scenarios}


def _planned(entry: dict[str, Any], cluster: str | None) -> dict[str, Any]:
    """Version 1 stored only the sizes of each side, and only the busiest rank's bytes."""
    same = ("name", "flags", "mode", "method", "num_ranks", "nodes", "ranks_per_node", "status", "reason")
    planned = {name: entry[name] for name in (*same, "memory_bytes", "notes") if name in entry}
    planned |= {"source": None, "destination": None}
    apart = entry["mode"] == "non-collocated"
    for name in ("source", "destination"):
        if entry.get(name):
            first = entry["source"]["world_size"] if apart and name == "destination" else 0
            planned[name] = {"layout": {**entry[name], "first_rank": first}, "dtype": None}
    moved = entry.get("bytes")
    if moved:
        busiest = {str(moved["busiest_rank"]): moved["busiest"]}
        sends = moved["busiest_direction"] == "sends"
        none = dict.fromkeys(busiest, 0)
        loads = {"sent_by_rank": busiest if sends else none, "received_by_rank": none if sends else busiest}
        planned["cost"] = _plan({**moved, **loads}, {})
    if entry.get("lower_bound_s") is not None:
        planned["bound"] = {
            "cluster": cluster or "",
            "seconds": entry["lower_bound_s"],
            "limited_by": entry.get("limited_by") or "",
        }
    return planned
