"""Whether Megatron can build a model in a layout: its rules for sizes, pipelines and multi-token prediction."""

from __future__ import annotations

from refit.config.flag_names import PIPELINE_LAYOUT_FLAGS, size_flag
from refit.config.layout import Layout
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError


def check(shape: ModelShape, side: SideSpec, name: str) -> None:
    """Raise UsageError where Megatron cannot build this model in this layout; `name` is the side's in the message."""
    layout, experts = side.layout, shape.experts
    tp = layout.tp
    divisible = [
        (shape.num_attention_heads, tp, "attention heads", "TP size"),
        (shape.ffn_hidden_size, tp, "FFN hidden size", "TP size"),
    ]
    if shape.mla is None and shape.num_query_groups > tp:
        divisible.append((shape.num_query_groups, tp, "query groups", "TP size"))
    if shape.mla is None and shape.num_query_groups < tp:
        if shape.qk_norm_over_heads:
            raise UsageError(
                f"{name}: Megatron splits {shape.num_query_groups} query groups over TP size {tp} only with norms of "
                f"single heads: give {size_flag(name, 'tp')} {shape.num_query_groups} or less"
            )
        divisible.append((tp, shape.num_query_groups, "TP size", "query groups"))
    if experts is not None:
        divisible += [
            (experts.num_experts, layout.ep, "experts", "EP size"),
            (experts.ffn_hidden_size, layout.etp, "expert FFN hidden size", "ETP size"),
            (experts.shared_ffn_hidden_size or tp, tp, "shared expert FFN hidden size", "TP size"),
        ]
    if shape.delta_net is not None:
        divisible.append((shape.delta_net.num_key_heads, tp, "key heads of delta nets", "TP size"))
    if shape.mtp_num_layers:
        divisible.append((shape.hidden_size, tp, "hidden size, of multi-token prediction,", "TP size"))
    for number, divisor, what, by in divisible:
        if number % divisor:
            raise UsageError(f"{name}: {number} {what} cannot be divided by {by} {divisor}")
    if experts is not None and shape.add_bias_linear and layout.etp > 1:
        raise UsageError(
            f"{name}: Megatron-Core has no biases in routed experts with ETP size {layout.etp}: give "
            f"{size_flag(name, 'etp')} 1"
        )
    if experts is None and layout.ep > 1:
        raise UsageError(f"{name}: EP size {layout.ep} needs experts: give --num-experts, or {size_flag(name, 'ep')} 1")
    check_pipeline(shape, layout, name)
    if shape.mtp_num_layers:
        _check_token_prediction(shape, layout, name)


def check_pipeline(shape: ModelShape, layout: Layout, name: str) -> None:
    """Raise UsageError where the layers, or those of multi-token prediction, are not those of the pipeline layout."""
    flag = f"--{PIPELINE_LAYOUT_FLAGS[name == 'destination']}"
    try:
        layout.chunk_layers(shape.num_layers)
    except UsageError as error:
        raise UsageError(f"{name}: {error} ({size_flag(name, 'pp')}, {flag})") from None
    listed = sum(layout.chunk_predictions or ())
    if layout.chunk_predictions is not None and listed != shape.mtp_num_layers:
        raise UsageError(
            f"{name}: {flag} lists {listed} multi-token prediction layers (m), the model has {shape.mtp_num_layers}: "
            f"list each once, or give --mtp-num-layers {listed}"
        )


def _check_token_prediction(shape: ModelShape, layout: Layout, name: str) -> None:
    """Raise UsageError for a model that Megatron cannot build with multi-token prediction layers."""
    if shape.position_embedding_type == "learned_absolute":
        # The rule of Megatron-LM's arguments.py.
        raise UsageError(
            f"{name}: {shape.mtp_num_layers} multi-token prediction layers need --position-embedding-type rope or none"
        )
    if shape.kinds[-1].delta_net:
        raise UsageError(
            f"{name}: Megatron-Core predicts tokens with attention only, and the last layer, whose kind its "
            f"{shape.mtp_num_layers} multi-token prediction layers are of, has a delta net: change "
            "--linear-attention-freq, or give --mtp-num-layers 0"
        )
    chunk, remedy = layout.prediction_chunk, "give --untie-embeddings-and-output-weights or set PP to 1"
    if shape.tied_embeddings and layout.pp > 1 and chunk == layout.pp * layout.vpp - 1:
        # The last stage then has an embedding and an output layer, of which `sharded_state_dict` allows one.
        raise UsageError(
            f"{name}: Megatron cannot tie the output layer to the embedding with {shape.mtp_num_layers} multi-token "
            f"prediction layers on PP size {layout.pp}: {remedy}"
        )
    if shape.tied_embeddings and chunk and chunk % layout.pp == 0:
        # `setup_embeddings_and_output_layer` sums the embedding once for each chunk that has it, on every other stage
        # once: the first stage would wait for ever.
        raise UsageError(
            f"{name}: Megatron cannot tie the output layer to the embedding with prediction layers in chunk "
            f"{chunk // layout.pp} of the first stage, beside the embedding: {remedy}"
        )
