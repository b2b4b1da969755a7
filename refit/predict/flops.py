"""Floating-point operations of a model: those of its matrix products, which is what a TFLOP/s figure counts.

A product of [m, k] and [k, n] is 2 m k n operations. The backward pass takes twice the forward's: one product for the
inputs' gradients, one for the weights' (Megatron-LM, Narayanan et al. 2021, arXiv:2104.04473, appendix; the same terms
as `num_floating_point_operations` of Megatron-LM's training.py). Recomputed activations do not count. Of the experts,
those that a token is routed to count. Causal attention is counted at half of the square.
"""

from __future__ import annotations

from refit.config.shape import DeltaNet, LatentAttention, ModelShape

BACKWARD = 2
"""Operations of the backward pass over those of the forward pass."""


def forward_flops(shape: ModelShape, num_sequences: int, seq_length: int) -> float:
    """Operations of a forward pass over `num_sequences` sequences, output layer included."""
    tokens = num_sequences * seq_length
    layers = sum(_layer(shape, layer, seq_length) for layer in range(shape.num_layers))
    hidden, vocabulary = shape.hidden_size, shape.padded_vocab_size(1)
    # A multi-token prediction layer: a projection of [token; hidden state], a layer, and the output layer once more.
    last = _layer(shape, shape.num_layers - 1, seq_length)
    prediction = shape.mtp_num_layers * (2 * 2 * hidden * hidden + last + 2 * hidden * vocabulary)
    return float(tokens * (layers + 2 * hidden * vocabulary + prediction))


def train_flops(shape: ModelShape, num_sequences: int, seq_length: int) -> float:
    """Operations of a training step over `num_sequences` sequences, forward and backward."""
    return (1 + BACKWARD) * forward_flops(shape, num_sequences, seq_length)


def _layer(shape: ModelShape, layer: int, seq_length: int) -> int:
    """Operations of a decoder layer for one token."""
    net = shape.delta_net
    if net is not None and net.layers[layer]:
        return 2 * (_delta_net_weights(shape.hidden_size, net) + _mlp_weights(shape, layer)) + delta_rule_flops(net)
    return 2 * (_attention_weights(shape) + _mlp_weights(shape, layer)) + _attention_scores(shape, seq_length)


def _delta_net_weights(hidden: int, net: DeltaNet) -> int:
    """Elements of the projections and of the convolution that a token is multiplied with."""
    convolved = net.conv_kernel_dim * (2 * net.key_width + net.value_width)
    return hidden * (2 * net.key_width + 3 * net.value_width + 2 * net.num_value_heads) + convolved


def delta_rule_flops(net: DeltaNet) -> int:
    """Operations of the recurrence for one token: each value head's state is read with the key and with the query, and
    gets the product of key and change (arXiv:2412.06464, equation 10)."""
    return 3 * 2 * net.num_value_heads * net.key_head_dim * net.value_head_dim


def _attention_weights(shape: ModelShape) -> int:
    """Elements of the projections that a token is multiplied with."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    if shape.mla is None:
        return hidden * shape.kv_channels * ((2 + shape.attention_output_gate) * heads + 2 * shape.num_query_groups)
    mla = shape.mla
    query_width = heads * (mla.qk_head_dim + mla.qk_pos_emb_head_dim)
    queries = hidden * query_width if mla.q_lora_rank is None else mla.q_lora_rank * (hidden + query_width)
    keys_values = hidden * (mla.kv_lora_rank + mla.qk_pos_emb_head_dim)
    keys_values += mla.kv_lora_rank * heads * (mla.qk_head_dim + mla.v_head_dim)
    return queries + keys_values + heads * mla.v_head_dim * hidden


def _attention_scores(shape: ModelShape, seq_length: int) -> int:
    """Scores and weighted values of one token, over half of the sequence on average."""
    query, value = _head_widths(shape, shape.mla)
    return shape.num_attention_heads * (query + value) * seq_length  # 2 operations each, over seq_length / 2


def _head_widths(shape: ModelShape, mla: LatentAttention | None) -> tuple[int, int]:
    if mla is None:
        return shape.kv_channels, shape.kv_channels
    return mla.qk_head_dim + mla.qk_pos_emb_head_dim, mla.v_head_dim


def _mlp_weights(shape: ModelShape, layer: int) -> int:
    """Elements of the MLP, or of router, shared and chosen experts, that a token is multiplied with."""
    matrices, hidden, experts = 3 if shape.swiglu else 2, shape.hidden_size, shape.experts
    if experts is None or not experts.layers[layer]:
        return matrices * hidden * shape.ffn_hidden_size
    width = experts.latent_size or hidden
    routed = experts.topk * matrices * width * experts.ffn_hidden_size
    latent = 2 * hidden * experts.latent_size if experts.latent_size else 0
    shared = matrices * hidden * (experts.shared_ffn_hidden_size or 0) + hidden * experts.shared_gate
    return routed + latent + shared + hidden * experts.num_experts
