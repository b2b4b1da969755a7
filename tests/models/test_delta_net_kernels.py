"""Steps that would time the wrong kernels are refused."""

import pytest
import torch

from refit.cli.parsing import parse
from refit.errors import UnavailableError
from refit.models import delta_net_kernels
from refit.models.delta_net_kernels import check_kernels

STEPS = ["--measure=train-step,refit", "--seq-length=16", "--global-batch-size=2", "--micro-batch-size=1"]


def test_steps_of_delta_nets_on_a_gpu_need_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    of_nets, of_attention = (
        parse(["--dry-run", f"--model={name}", *STEPS]).scenario for name in ("tiny_qwen3_next", "tiny_qwen3_moe")
    )
    refit_alone = parse(["--dry-run", "--model=tiny_qwen3_next"]).scenario
    monkeypatch.setattr(delta_net_kernels, "has_kernels", lambda: False)
    with pytest.raises(UnavailableError, match=r"need the module fla, .*: pip install flash-linear-attention, or"):
        check_kernels(of_nets, torch.device("cuda"))
    check_kernels(of_nets, torch.device("cpu"))
    check_kernels(of_attention, torch.device("cuda"))
    check_kernels(refit_alone, torch.device("cuda"))
    monkeypatch.setattr(delta_net_kernels, "has_kernels", lambda: True)
    check_kernels(of_nets, torch.device("cuda"))
