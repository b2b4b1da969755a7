"""Megatron-LM's flags that change no weight, or none that this benchmark builds.

A training command line can be pasted as it stands. Flags that change no weight are accepted and recorded: those of
NAMED and LISTED. All others are refused, since to ignore one could measure another model: those that change which
weights exist, or where they lie, with the reason, and the rest as unknown. Names are those of the parser in
`megatron/training/arguments.py` of Megatron-LM 0.16 to 0.19; megatron-core's wheels have it from 0.17 on.
"""

from __future__ import annotations

import re
from pathlib import Path

NAMED: dict[str, str] = dict(
    re.findall(
        r"([a-z0-9-]+)([#=*]?)",
        """
        cp-comm-type* cuda-graph-modules* cuda-graph-scope* data-path*
        ddp-param-name-patterns-for-fp32-local-accumulation* decoder-seq-length# encoder-seq-length# finetune
        high-priority-stream-groups* hysteresis= iterations-to-skip* load= local-rank= mock-data
        moe-aux-loss-coeff* moe-expert-capacity-factor= moe-router-load-balancing-type* moe-router-score-function=
        mrope-section* no-position-embedding no-rl-inference-logprobs-is-correction offload-modules* optimizer= profile
        profile-ranks*
        rampup-batch-size* rl-inference-logprobs-is-correction rl-inference-model-unified-memory-level=
        rl-inference-parsers* rl-parallel-generation-tasks# save= sft split= test-data-path* tokenizer-special-tokens*
        train-data-path*
        train-iters# train-samples# valid-data-path* validation-set-names* verify-integrity warmup=
        """,
    )
)
"""Flags that are checked: `name#` takes a positive number, `name=` one value, `name*` any number, `name` none."""

LISTS = Path(__file__).parent / "megatron_flags"
"""A file per version of Megatron-LM: names, one a line, that this version has and the ones before it have not."""


def _listed() -> dict[str, str]:
    """The names of all lists, with the version that each is listed for."""
    return {
        name: file.stem
        for file in sorted(LISTS.glob("*.txt"))
        for name in file.read_text(encoding="utf-8").split("\n")
        if name and not name.startswith("#")
    }


LISTED = _listed()
"""Flags that are recorded as they come, with one value or none, by the version of Megatron-LM that they are from."""


REFUSED_VALUES = {
    "context-parallel-size": (
        "1",
        "context parallelism does not cut weights: count its ranks with --source-world-size",
    ),
    "hierarchical-context-parallel-sizes": ("", "context parallelism does not cut weights"),
    "mtp-hybrid-override-pattern": ("", "hybrid models are not built"),
    "model-parallel-size": ("", "use --tensor-model-parallel-size"),
    "encoder-num-layers": ("", "use --num-layers"),
    "decoder-num-layers": ("", "use --num-layers"),
    "tensor-parallel-num-weight-shards": ("1", "weight shards beyond TP are not built"),
    "expert-tensor-parallel-num-weight-shards": ("1", "weight shards beyond ETP are not built"),
    "moe-mlp-glu-interleave-size": ("", "interleaved gate and up rows are not built"),
    "moe-shared-expert-glu-interleave-size": ("", "interleaved gate and up rows are not built"),
    "hybrid-layer-pattern": ("", "hybrid models are not built"),
    "hybrid-override-pattern": ("", "hybrid models are not built"),
    "heterogeneous-layers-config-path": ("", "layers of different kinds beyond --moe-layer-freq are not built"),
    "heterogeneous-layers-config-encoded-json": ("", "layers of different kinds beyond --moe-layer-freq are not built"),
    "spec": ("local", "bring a model of your own with --model-provider module:function"),
    "yaml-cfg": ("", "give the flags themselves, or a preset with --model FILE.yaml"),
}
"""Refused with a value: the one value that is neutral ("" for none), and what to do instead or why."""

REFUSED_SWITCHES = {
    "account-for-embedding-in-pipeline-split": "use --decoder-first-pipeline-num-layers",
    "account-for-loss-in-pipeline-split": "use --decoder-last-pipeline-num-layers",
    "disable-pad-vocab-size": "give the size to build with --padded-vocab-size",
    "fp4-param-gather": "4-bit parameters are not built",
    "fp8-param-gather": "8-bit parameters are not built",
    "hybrid-context-parallel": "context parallelism does not cut weights",
    "is-hybrid-model": "hybrid models are not built",
    "mla-down-proj-fusion": "fused down projections are not built",
    "moe-single-grouped-weight": "experts in a single weight are not built",
    "moe-use-legacy-grouped-gemm": "use --moe-grouped-gemm alone",
    "moe-use-upcycling": "upcycling is not built",
    "mtp-standalone": "Megatron-Core takes it from --pipeline-model-parallel-layout, leave it out",
    "mtp-use-repeated-layer": "every multi-token prediction layer is built with weights of its own",
    "no-pad-vocab-size": "give the size to build with --padded-vocab-size",
    "standalone-embedding-stage": "use --pipeline-model-parallel-layout, with a first stage E",
    "use-megatron-fsdp": "fully sharded data parallelism is not built",
    "use-torch-fsdp2": "fully sharded data parallelism is not built",
    "use-tp-pp-dp-mapping": "ranks are ordered tp-dp-pp",
}
"""Refused switches, and what to do instead or why."""
