"""Megatron-LM's flags that change no weight, or none that this benchmark builds.

A training command line can be pasted as it stands. Flags that change no weight are accepted and recorded: those of
NAMED and those of a family. Flags that change which weights exist, or where they lie, in a way not built here are
refused: to ignore one would measure another model. Names are those of `megatron/training/arguments.py` in Megatron-LM
0.16 to 0.19.
"""

from __future__ import annotations

import re

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

FAMILIES = """
    across-dp-ranks across-dp-replicas across-pp-ranks active-world adam adlr align-param all-gather amax app-tag
    apply-probs apply-wd async async-tensor-model-parallel attention-backend barrier-with base-hidden batch bias-update
    cache checkpoint chunked-prefill chunks ckpt clamp clip communication-unit communicator cross-entropy cuda-graph
    cuda-graphs data-args data-parallel-random data-parallel-sharding dataloader dataset ddp decay deepep delay-param
    deterministic distributed-backend distributed-timeout double-buffer dropout dump enable-experimental ep-consensus
    ep-overlap eval exit exp-avg-dtype exp-avg-sq-dtype expert-capacity expert-parallel-comm
    fake-process fault-injector fault-injector-num-ranks fault-injector-ranks fim fine-grained flash flex-dispatcher
    flight-recorder for-prefill force-biased force-load fp4-format fp8-format fp8-margin fp8-output freeze-all-layers ft
    full-validation fully-parallel fused-residual gc gelu-fusion gloo-process grad grad-comm-dtype gradient grads grpo
    hidden-dropout high-priority hsdp hybridep in-fp32 inference init initialization injection inprocess interval jit
    jitter l2-norm langrl layer-scaling layer-wise layernorm-1p layers-at-end layers-at-start layers-bf16 legacy-models
    legacy-static linear-offset lion log log-world-size logger logging loss lr main-grads-dtype main-params-dtype
    manual-registration mcore memory-level memory-snapshot merge-file microbatch mmap momentum msc mscale muon muon-tp
    mup nccl-ub ncclep no-rope-freq norm-epsilon num-groups nvtx offload offloaded offloading offloading-num-layers onnx
    oom op-fuser openai-gelu opt-param optim optimizer outer-dp overlap pad-expert-input pad-experts pad-tokens
    parallel-comm per-dp-cp permute-fusion persist phase-transition pin-cpu pre-softmax profile-step pytorch-profiler
    quantile quantizer recipe recompute recompute-num-layers record reduced-precision rejected relative-attention
    replication rerun reset reshard residual-connection ring-exchange rl rng rope-fusion rope-scaling rope-type
    rotary-base rotary-interleaved rotary-percent rotary-scaling rotary-seq router-dtype router-fusion router-group-topk
    router-padding routing-replay sample-rate saved-activations scatter shared-expert-overlap sharp skip-train
    softmax-fusion speculative squared-relu stash straggler strict-fsdp swiglu-fusion symmetric-ar
    symmetric-registration te-activation te-precision template tensorboard test-mode tiktoken token-drop tokenizer
    tokens-per-expert topk-scaling tp-comm tp-communication trust-remote validation-sets vocab-extra vocab-file wandb
    wgrad window with-experts workers workload yarn
"""
"""Words that mark a flag as one of training, checkpoints, logs or serving. Such a flag has one value or none.

Words that may name a size, a dtype or a setting of this benchmark are left out (`cpu`, `iters`, `nccl`, `timeout`, and
all of `moe`): a flag that the parser does not have would be ignored where it must be refused.
"""

SIZES = "cp dp dtype ep etp expert experts ffn gpus heads hidden layers nodes parallel pp ranks topk tp vocab world"
"""A flag with one of them, beside the words of its family, is in none: it may change weights."""

_FAMILY = re.compile(rf"-(?:{'|'.join(sorted(FAMILIES.split(), key=len, reverse=True))})(?=-)")


def in_family(name: str) -> bool:
    """Whether a flag, without dashes in front, is in a family. Those of the destination, `rl-inference-`, are not.

    Nor are two letters alone, which are a misspelt `--lr` or `--bf16` rather than a flag.
    """
    if len(name) <= 2:
        return False
    rest, num_found = _FAMILY.subn("", f"-{name}-")
    return num_found > 0 and "rl-inference-" not in name and set(SIZES.split()).isdisjoint(rest.split("-"))


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
    "softmax-type": ("vanilla", "softmax offsets are not built"),
    "experimental-attention-variant": ("", "only multi-head, grouped-query and multi-latent attention are built"),
    "linear-attention-freq": ("", "only multi-head, grouped-query and multi-latent attention are built"),
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
    "attention-output-gate": "attention output gates are not built",
    "fp4-param-gather": "4-bit parameters are not built",
    "fp8-param-gather": "8-bit parameters are not built",
    "hybrid-context-parallel": "context parallelism does not cut weights",
    "is-hybrid-model": "hybrid models are not built",
    "mla-down-proj-fusion": "fused down projections are not built",
    "moe-shared-expert-gate": "gates of shared experts are not built",
    "moe-single-grouped-weight": "experts in a single weight are not built",
    "moe-use-legacy-grouped-gemm": "use --moe-grouped-gemm alone",
    "moe-use-upcycling": "upcycling is not built",
    "mtp-standalone": "Megatron-Core takes it from --pipeline-model-parallel-layout, leave it out",
    "mtp-use-repeated-layer": "every multi-token prediction layer is built with weights of its own",
    "no-pad-vocab-size": "give the size to build with --padded-vocab-size",
    "quick-geglu": "of the gated activations only --swiglu is built",
    "standalone-embedding-stage": "use --pipeline-model-parallel-layout, with a first stage E",
    "use-megatron-fsdp": "fully sharded data parallelism is not built",
    "use-torch-fsdp2": "fully sharded data parallelism is not built",
    "use-tp-pp-dp-mapping": "ranks are ordered tp-dp-pp",
}
"""Refused switches, and what to do instead or why."""
