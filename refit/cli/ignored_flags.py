"""Megatron-LM's flags that change no weight, or none that this benchmark builds.

The first four tables are accepted and recorded, so that a training command line can be pasted as it stands. The last
names the flags that change which weights exist or where they lie in a way not built here: they are refused, since to
ignore one would measure another model. Names and arities are those of `megatron/training/arguments.py` in
Megatron-LM 0.16 to 0.19.
"""

from __future__ import annotations


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SIZES = _names(
    """
    decoder-seq-length encoder-seq-length global-batch-size micro-batch-size seq-length train-iters train-samples
    """
)
"""Flags with one positive number."""

VALUES = _names(
    """
    activation-func-clamp-value activation-offload-fraction adam-beta1 adam-beta2 adam-eps adlr-autoresume-interval
    app-tag-run-name app-tag-run-version async-ckpt-cpu-priority async-ckpt-io-priority async-strategy attention-backend
    attention-dropout batch-size chat-template check-weight-hash-across-dp-replicas-interval ckpt-format
    ckpt-fully-parallel-load-exchange-algo ckpt-fully-parallel-load-process-group ckpt-fully-parallel-save-process-group
    ckpt-step clip-grad config-logger-dir cpu-offloading-num-layers cross-entropy-fusion-impl cuda-graph-impl
    cuda-graph-warmup-steps data-args-path data-cache-path data-parallel-sharding-strategy dataloader-type
    ddp-bucket-size ddp-num-buckets decoupled-lr decoupled-min-lr delta-offload-bytes-across-pp-ranks dist-ckpt-format
    dist-ckpt-strictness dist-ckpt-workers distributed-backend distributed-timeout-minutes
    distributed-timeout-seconds-after-init dump-param-to-param-group-map embedding-init-method-std
    empty-unused-memory-level end-weight-decay error-injection-rate error-injection-type eval-global-batch-size
    eval-interval eval-iters eval-micro-batch-size exit-duration-in-mins exit-interval exit-signal exp-avg-dtype
    exp-avg-sq-dtype fault-injector-delay-start-iteration fault-injector-fault-delay fault-injector-fault-probabilities
    fault-injector-fault-types fault-injector-mtti-seconds fault-injector-num-ranks fault-injector-offset-seconds
    fault-injector-ranks fault-injector-seed fim-eod-token fim-fragment-rate fim-middle-token fim-no-prefix
    fim-pad-token fim-prefix-token fim-rate fim-split-sample fim-spm-rate fim-suffix-token
    fine-grained-offloading-max-inflight-offloads flash-attention-version flight-recorder-dump-path
    flight-recorder-trace-buffer-size fp4-format fp4-quantizer-factory fp4-recipe fp8-amax-compute-algo
    fp8-amax-history-len fp8-format fp8-interval fp8-margin fp8-quantizer-factory fp8-recipe ft-num-warmup-iters
    glu-linear-offset gpu-sniff-test-interval grpo-clamp-eps-lower grpo-clamp-eps-upper grpo-entropy-term-weight
    grpo-group-size grpo-iterations grpo-kl-beta grpo-prompts-per-step hidden-dropout hysteresis
    inference-batch-times-seqlen-threshold inference-coordinator-port inference-cuda-graph-max-tokens
    inference-cuda-graph-scope inference-dynamic-batching-async-sched-mode inference-dynamic-batching-block-size
    inference-dynamic-batching-buffer-size-gb inference-dynamic-batching-cuda-graph-mixed-prefill-count
    inference-dynamic-batching-cuda-graph-sizing-distribution inference-dynamic-batching-logprobs-mode
    inference-dynamic-batching-mamba-memory-ratio inference-dynamic-batching-max-requests
    inference-dynamic-batching-max-tokens inference-dynamic-batching-num-cuda-graphs
    inference-dynamic-batching-paused-buffer-size-gb inference-dynamic-batching-prefix-caching-coordinator-policy
    inference-dynamic-batching-prefix-caching-eviction-policy inference-dynamic-batching-prefix-caching-mamba-gb
    inference-dynamic-batching-prefix-caching-routing-alpha inference-dynamic-batching-sampling-backend
    inference-dynamic-batching-unified-memory-level inference-grouped-gemm-backend inference-logging-step-interval
    inference-max-requests inference-max-seq-length inference-moe-token-dispatcher-type inference-shards init-method-std
    initial-loss-scale inprocess-active-world-size inprocess-barrier-timeout inprocess-completion-timeout
    inprocess-granularity inprocess-hard-timeout inprocess-heartbeat-interval inprocess-heartbeat-timeout
    inprocess-last-call-wait inprocess-max-iterations inprocess-monitor-process-interval
    inprocess-monitor-thread-interval inprocess-progress-watchdog-interval inprocess-soft-timeout
    inprocess-termination-grace-time kitchen-attention-backend langrl-env-config lion-beta1 lion-beta2 load local-rank
    log-interval log-memory-interval logging-level loss-scale loss-scale-window lr lr-decay-iters lr-decay-samples
    lr-decay-style lr-warmup-fraction lr-warmup-init lr-warmup-iters lr-warmup-samples lr-wsd-decay-iters
    lr-wsd-decay-samples lr-wsd-decay-style main-grads-dtype main-params-dtype manual-gc-interval
    max-seqlen-per-dp-cp-rank max-tokens-to-oom megatron-fsdp-grad-comm-dtype megatron-fsdp-main-grads-dtype
    megatron-fsdp-main-params-dtype memory-snapshot-path merge-file microbatch-group-size-per-virtual-pipeline-stage
    mid-level-dataset-surplus min-loss-scale min-lr min-offloaded-tensor-size mlp-chunks-for-prefill
    mlp-chunks-for-training moe-deepep-num-sms moe-expert-capacity-factor moe-expert-rank-capacity-factor
    moe-flex-dispatcher-backend moe-flex-dispatcher-num-sms moe-hybridep-num-blocks-permute
    moe-hybridep-num-blocks-unpermute moe-hybridep-num-sms moe-hybridep-num-sms-preprocessing moe-input-jitter-eps
    moe-paged-stash-buffer-size-factor-cpu moe-paged-stash-buffer-size-factor-cuda moe-paged-stash-page-size
    moe-router-bias-update-rate moe-router-dtype moe-router-force-biased moe-router-group-topk moe-router-num-groups
    moe-router-quantile-balancing-ema moe-router-score-function moe-router-topk-scaling-factor moe-token-dispatcher-type
    moe-token-drop-policy moe-z-loss-coeff mscale mscale-all-dim mtp-loss-scaling-factor muon-coefficient-type
    muon-extra-scale-factor muon-fp32-matmul-prec muon-momentum muon-num-ns-steps muon-scalar-optimizer muon-scale-mode
    muon-tp-mode mup-attn-scale-power mup-base-head-dim mup-base-hidden-size mup-embedding-mult mup-output-mult
    mup-width-mult nccl-communicator-config-path no-rope-freq no-weight-decay-cond-type non-persistent-ckpt-type
    non-persistent-global-ckpt-dir non-persistent-local-ckpt-algo non-persistent-local-ckpt-dir
    non-persistent-save-interval norm-epsilon null-tokenizer-eod-id null-tokenizer-pad-id num-dataset-builder-threads
    num-distributed-optimizer-instances num-layers-at-end-in-bf16 num-layers-at-start-in-bf16 num-speculative-tokens
    num-workers object-storage-cache-path one-logger-project one-logger-run-name onnx-safe optimizer
    optimizer-offload-fraction outer-dp-sharding-strategy override-ckpt-iteration per-dataset-sequences-path
    per-split-data-args-path persistent-save-interval phase-transition-iterations pipeline-model-parallel-comm-backend
    pretrained-checkpoint profile-step-end profile-step-start qk-clip-alpha qk-clip-threshold recompute-granularity
    recompute-method recompute-num-layers relative-attention-max-distance relative-attention-num-buckets
    replication-factor replication-jump rerun-mode result-rejected-tracker-filename rl-consumption-granularity
    rl-default-temperature rl-default-top-k rl-default-top-p rl-generation-lag rl-importance-sampling-truncation-coef
    rl-inference-model-unified-memory-level rl-kv-cache-management-mode rl-profile-dir rl-prompts-per-eval
    rl-sequence-packing-algo rl-sequence-packing-max-sequences-per-bin rl-submission-granularity rope-scaling-factor
    rope-type rotary-base rotary-percent rotary-scaling-factor rotary-seq-len-interpolation-factor sample-rate save
    save-activations-interval save-dgrads-interval save-interval save-params-interval save-retain-interval
    save-tokens-per-expert-interval save-wgrads-interval seed sft-tokenizer-prompt-format sgd-momentum
    sharp-enabled-group split start-eval-at-iter start-weight-decay step-batch-size-schedule straggler-ctrlr-port
    straggler-minmax-count suggested-communication-unit-size symmetric-ar-type te-precision-config-file tensorboard-dir
    tensorboard-log-interval tensorboard-queue-size tiktoken-num-special-tokens tiktoken-pattern timing-log-level
    timing-log-option tokenizer-metadata tokenizer-model tokenizer-type tp-comm-bootstrap-backend tp-comm-overlap-cfg
    train-sync-interval vocab-extra-ids vocab-file wandb-entity wandb-exp-name wandb-project wandb-save-dir warmup
    weight-decay weight-decay-incr-style wgrad-deferral-limit window-attn-skip-freq window-size yarn-beta-fast
    yarn-beta-slow yarn-original-max-position-embeddings
    """
)
"""Flags with one value of any kind."""

LISTS = _names(
    """
    cp-comm-type cuda-graph-modules cuda-graph-scope data-path ddp-param-name-patterns-for-fp32-local-accumulation
    high-priority-stream-groups iterations-to-skip moe-aux-loss-coeff moe-router-load-balancing-type mrope-section
    offload-modules profile-ranks rampup-batch-size recompute-modules rl-inference-parsers test-data-path
    tokenizer-special-tokens train-data-path valid-data-path validation-set-names
    """
)
"""Flags with any number of values."""

SWITCHES = _names(
    """
    accumulate-allreduce-grads-in-fp32 adlr-autoresume allow-ambiguous-pad-tokens apply-layernorm-1p
    apply-query-key-layer-scaling apply-residual-connection-post-layernorm apply-wd-to-qk-layernorm
    async-ckpt-use-cpu-shm async-save attention-softmax-in-fp32 auto-detect-ckpt-format batch-invariant-mode
    cache-mla-latents calc-ft-timeouts calculate-per-token-loss check-for-large-grads check-for-spiky-loss
    checkpoint-activations ckpt-assume-constant-structure ckpt-fully-parallel-load ckpt-fully-parallel-save
    cpu-offloading-retain-pinned-cpu-buffers create-all-gather-group cross-entropy-loss-fusion data-parallel-random-init
    dataloader-defer-npy-index-mmap dataloader-fast-cache-load dataloader-inter-document-masking
    ddp-average-in-collective ddp-pad-buckets-for-high-nccl-busbw ddp-reduce-scatter-with-fp32-accumulation
    decode-only-cuda-graphs decrease-batch-size-if-needed defer-embedding-wgrad-compute delay-offload-until-cuda-graph
    delay-param-gather delay-wgrad-compute deterministic-mode disable-align-grad-reduce
    disable-bf16-reduced-precision-matmul disable-ckpt-load-validate-sharding-integrity
    disable-clone-scatter-output-in-embedding disable-flight-recorder-dump-on-timeout
    disable-flight-recorder-extra-dump-on-exec disable-flight-recorder-include-only-active disable-fp8-wgrad
    disable-gloo-process-groups disable-jit-fuser disable-log-loss-scale-to-tensorboard disable-manual-gc-eval
    disable-msc disable-straggler-on-startup disable-stream-ckpt-dequant disable-strict-fsdp-dtensor-load
    disable-symmetric-registration disable-tokenizer-sentencepiece-ignore-extra-whitespaces disable-tp-comm-bulk-dgrad
    disable-tp-comm-bulk-wgrad disable-tp-comm-overlap-ag disable-tp-comm-overlap-rs disable-tp-comm-split-ag
    disable-tp-comm-split-rs disable-use-tokenizer-model-from-checkpoint-args dist-ckpt-optim-fully-reshardable
    dist-ckpt-save-pre-mcore-014 distrib-optim-fully-reshardable-mem-efficient distribute-saved-activations
    enable-chunked-prefill enable-cuda-graph enable-experimental enable-ft-package enable-full-sharding-in-hsdp
    enable-msc eod-mask-loss ep-overlap-early-attn-memory-release exit-on-missing-checkpoint exit-signal-handler
    exit-signal-handler-for-dataloader exit-signal-handler-for-training external-cuda-graph fake-process-group fim-data
    fine-grained-activation-offloading finetune first-last-layers-bf16 flash-decode flight-recorder-include-stack-trace
    fp16-lm-cross-entropy fp32-residual-connection fp8-output-proj freeze-all-layers
    fsdp-db-use-persist-buf-on-alloc-fail fsdp-double-buffer fsdp-manual-registration full-validation
    fused-residual-rmsnorm grad-reduce-in-bf16 grpo-filter-groups-with-same-reward high-priority-a2a-comm-stream
    inference-cuda-graph-all-prefills inference-disable-ep-consensus inference-disable-triton-nvls-kernels
    inference-dynamic-batching inference-dynamic-batching-prefix-caching
    inference-dynamic-batching-track-generated-token-events inference-dynamic-batching-track-paused-request-events
    inference-fuse-tp-communication inference-moe-disable-fused-quant-kernels inference-rng-tracker
    inference-text-gen-server-logging inference-use-synchronous-zmq-collectives inference-wandb-logging
    init-method-xavier-uniform init-model-with-meta-device inprocess-empty-cuda-cache inprocess-restart
    keep-fp8-transpose-cache lazy-mpu-init load-main-params-from-ckpt log-batch-size-to-tensorboard
    log-device-memory-used log-energy log-max-attention-logit log-memory-to-tensorboard log-num-zeros-in-grad
    log-params-norm log-progress log-straggler log-throughput log-timers-to-tensorboard
    log-validation-ppl-to-tensorboard log-world-size-to-tensorboard manual-gc
    megatron-fsdp-enable-fine-grained-param-gather megatron-fsdp-max-pool-double-buffer mock-data
    moe-apply-probs-on-input moe-enable-deepep moe-enable-routing-replay moe-hybridep-pad-uneven-dispatch-inputs
    moe-layer-recompute moe-ncclep-static-shape moe-ncclep-zero-copy moe-pad-expert-input-to-capacity
    moe-pad-experts-for-cuda-graph-inference moe-paged-stash moe-per-layer-logging moe-permute-fusion
    moe-permute-fusion-into-hybridep moe-router-force-load-balancing moe-router-fusion moe-router-padding-for-fp8
    moe-router-padding-for-quantization moe-router-pre-softmax moe-shared-expert-overlap multiple-validation-sets
    muon-nesterov muon-no-split-qkv nccl-all-reduce-for-prefill no-align-grad-reduce no-align-param-gather
    no-async-tensor-model-parallel-allreduce no-barrier-with-level-1-timing no-bias-dropout-fusion no-bias-gelu-fusion
    no-bias-swiglu-fusion no-check-for-nan-in-loss-and-grad no-ckpt-fully-parallel-save
    no-ckpt-load-validate-sharding-integrity no-clone-scatter-output-in-embedding no-create-attention-mask-in-dataloader
    no-delay-grad-reduce no-flight-recorder-dump-on-timeout no-flight-recorder-extra-dump-on-exec
    no-flight-recorder-include-only-active no-fp8-wgrad no-gradient-accumulation-fusion no-gradient-reduce-div-fusion
    no-inference-disable-ep-consensus no-inference-dynamic-batching-prefix-caching no-inference-text-gen-server-logging
    no-inference-use-synchronous-zmq-collectives no-inference-wandb-logging no-initialization no-load-optim no-load-rng
    no-log-loss-scale-to-tensorboard no-manual-gc-eval no-masked-softmax-fusion no-mmap-bin-files no-one-logger
    no-overlap-p2p-communication no-persist-layer-norm no-pin-cpu-grads no-pin-cpu-params no-query-key-layer-scaling
    no-rl-inference-logprobs-is-correction no-rl-offload-inference-model-weights-when-idle no-rl-partial-rollouts
    no-rl-persist-cuda-graphs no-rl-skip-bos-token no-rl-training-cuda-graphs no-rl-use-sequence-packing
    no-rl-verify-model-weights-swap no-rope-fusion no-save-optim no-save-rng no-scatter-gather-tensors-in-pipeline
    no-stream-ckpt-dequant no-strict-fsdp-dtensor-load no-tokenizer-sentencepiece-ignore-extra-whitespaces
    no-tp-comm-bulk-dgrad no-tp-comm-bulk-wgrad no-tp-comm-overlap-ag no-tp-comm-overlap-rs no-tp-comm-split-ag
    no-tp-comm-split-rs no-use-layer-wise-param-layout no-use-tokenizer-model-from-checkpoint-args
    no-yarn-correction-range-round-to-int nvtx-ranges one-logger-async openai-gelu optimizer-cpu-offload
    optimizer-cuda-graph overlap-cpu-optimizer-d2h-h2d overlap-dispatch-backward-with-experts-wgrad overlap-grad-reduce
    overlap-moe-expert-parallel-comm overlap-p2p-communication overlap-p2p-communication-warmup-flush
    overlap-param-gather overlap-param-gather-with-optimizer-step override-opt-param-scheduler perform-rl-step profile
    pytorch-profiler-collect-callstack pytorch-profiler-collect-chakra pytorch-profiler-collect-shapes qk-clip
    qk-l2-norm recompute-activations record-memory-history record-shapes replication reset-attention-mask
    reset-position-ids reuse-grad-buf-for-mxfp8-param-ag rl-inference-logprobs-is-correction
    rl-offload-inference-model-weights-when-idle rl-offload-optimizer-during-inference rl-partial-rollouts
    rl-persist-cuda-graphs rl-profile rl-skip-bos-token rl-training-cuda-graphs rl-use-sequence-packing
    rl-verify-model-weights-swap rotary-interleaved run-workload-inspector-server sequence-parallel sft skip-train
    squared-relu te-rng-tracker test-mode tokenizer-hf-no-include-special-tokens tokenizer-hf-no-use-fast
    tokenizer-sentencepiece-legacy torch-fsdp2-no-reshard-after-forward tp-comm-overlap tp-comm-overlap-rs-dgrad
    trust-remote-code use-checkpoint-args use-checkpoint-opt-param-scheduler use-cpu-initialization use-dist-ckpt
    use-distributed-optimizer use-flash-attn use-fused-weighted-squared-relu use-legacy-models use-legacy-static-engine
    use-mcore-models use-mp-args-from-checkpoint-args use-mup use-nccl-ub use-persistent-ckpt-worker
    use-precision-aware-optimizer use-pytorch-profiler use-ring-exchange-p2p use-rope-scaling
    use-same-sampling-seed-across-dp-ranks use-sharp use-te-activation-func use-torch-optimizer-for-cpu-offload
    use-transformer-engine-op-fuser verify-integrity yarn-correction-range-round-to-int
    """
)
"""Flags without a value."""

REFUSED_VALUES = {
    "context-parallel-size": (
        "1",
        "context parallelism does not cut weights: count its ranks with --source-world-size",
    ),
    "hierarchical-context-parallel-sizes": ("", "context parallelism does not cut weights"),
    "mtp-num-layers": ("0", "multi-token prediction layers are not built"),
    "mtp-hybrid-override-pattern": ("", "multi-token prediction layers are not built"),
    "num-layers-per-virtual-pipeline-stage": ("", "interleaved pipeline stages are not built"),
    "num-virtual-stages-per-pipeline-rank": ("1", "interleaved pipeline stages are not built"),
    "pipeline-model-parallel-layout": (
        "",
        "give the uneven stages with --decoder-first-pipeline-num-layers and -last-",
    ),
    "model-parallel-size": ("", "use --tensor-model-parallel-size"),
    "encoder-num-layers": ("", "use --num-layers"),
    "decoder-num-layers": ("", "use --num-layers"),
    "tensor-parallel-num-weight-shards": ("1", "weight shards beyond TP are not built"),
    "expert-tensor-parallel-num-weight-shards": ("1", "weight shards beyond ETP are not built"),
    "softmax-type": ("vanilla", "softmax offsets are not built"),
    "experimental-attention-variant": ("", "only multi-head, grouped-query and multi-latent attention are built"),
    "linear-attention-freq": ("", "only multi-head, grouped-query and multi-latent attention are built"),
    "moe-latent-size": ("", "latent experts are not built"),
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
    "mtp-standalone": "multi-token prediction layers are not built",
    "no-position-embedding": "use --position-embedding-type none",
    "no-pad-vocab-size": "give the size to build with --padded-vocab-size",
    "quick-geglu": "of the gated activations only --swiglu is built",
    "standalone-embedding-stage": "stages without layers are not built",
    "use-megatron-fsdp": "fully sharded data parallelism is not built",
    "use-torch-fsdp2": "fully sharded data parallelism is not built",
    "use-tp-pp-dp-mapping": "ranks are ordered tp-dp-pp",
}
"""Refused switches, and what to do instead or why."""
