"""The process of a running engine: `host.py FD PARENT`, with the Python of vLLM's environment.

It makes the engine of the settings that come first over the socket FD, and then does what it is asked to, one request
after another. A request is the name of a method of `Host` and its arguments. The answer is `("ok", value)` or
`("error", reason)`. It ends with PARENT, the process that started it.
"""

from __future__ import annotations

import os
import re
import sys
import time
from importlib.util import find_spec
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

DECODE_WARMUP, MOST_DECODED = 2, 255


class Host:
    """The engine and what is done with it. Its scheduler and first worker are in this process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        _stand_in_for_ray()
        from vllm import LLM

        self._llm = LLM(**settings)
        if settings.get("weight_transfer_config"):
            self._llm.init_weight_transfer_engine({"init_info": {}})
        self._num_requests = 0
        self._running: list[str] = []
        self.generate(list(range(1, 9)), 2)  # some models start, and then have no kernel

    def describe(self) -> dict[str, Any]:
        """Versions, sizes, and the load format of every worker."""
        import torch
        import vllm

        config = self._llm.llm_engine.vllm_config
        return {
            "version": vllm.__version__,
            "torch": torch.__version__,
            "tp": config.parallel_config.tensor_parallel_size,
            "rounds_scales": _rounds_scales(),
            "workers": self._llm.collective_rpc("refit_layout"),
        }

    def open(self, regions: dict[int, Any]) -> list[Any]:
        return self._rpc("refit_open", regions)

    def export(self) -> list[Any]:
        return self._rpc("refit_export")

    def serve(self, prompt: list[int], num_requests: int) -> int:
        """Put requests in flight and decode their first tokens. Returns how many run."""
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        for _ in range(num_requests):
            self._num_requests += 1
            self._running.append(f"running-{self._num_requests}")
            parameters = SamplingParams(max_tokens=64, temperature=0, detokenize=False, ignore_eos=True)
            engine.add_request(self._running[-1], {"prompt_token_ids": prompt}, parameters)
        for _ in range(2):
            engine.step()
        return int(engine.get_num_unfinished_requests())

    def pause(self) -> float:
        """Abort what runs and schedule nothing more. Returns the seconds; so do the other phases."""
        begin = time.perf_counter()
        self._llm.llm_engine.abort_request(self._running)
        self._running.clear()
        self._llm.sleep(level=0, mode="abort")
        self._rpc("refit_idle")
        return time.perf_counter() - begin

    def sleep(self, level: int) -> float:
        """Abort what runs, and give up the memory of weights and cache."""
        begin = time.perf_counter()
        self._llm.llm_engine.abort_request(self._running)
        self._running.clear()
        self._llm.sleep(level=level, mode="abort")
        return time.perf_counter() - begin

    def wake(self, tag: str) -> float:
        """Take memory again, of `weights` or of `kv_cache`. Only what was kept in host memory has its values."""
        begin = time.perf_counter()
        self._llm.wake_up(tags=[tag])
        self._rpc("refit_idle")
        return time.perf_counter() - begin

    def commit(self) -> tuple[float, list[dict[str, float]]]:
        """The seconds of the slowest worker, and every worker's by kind of layer."""
        begin = time.perf_counter()
        parts = self._rpc("refit_commit")
        return time.perf_counter() - begin, parts

    def reset_cache(self) -> float:
        begin = time.perf_counter()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache, since requests still use it")
        return time.perf_counter() - begin

    def resume(self) -> float:
        begin = time.perf_counter()
        self._llm.wake_up(tags=["scheduling"])
        return time.perf_counter() - begin

    def verify(self) -> list[Any]:
        return self._rpc("refit_verify")

    def read_back(self) -> list[Any]:
        return self._rpc("refit_read_back")

    def reload(self, path: str) -> float:
        """vLLM's own reload, from a checkpoint."""
        begin = time.perf_counter()
        self._rpc("refit_reload", path)
        return time.perf_counter() - begin

    def update(
        self, names: list[str], dtypes: list[str], shapes: list[list[int]], handles: list[Any]
    ) -> dict[str, float]:
        """vLLM's own update from tensors of another process on the same GPU. Returns the seconds of its calls."""
        import torch

        laps = [time.perf_counter()]
        self._llm.start_weight_update()
        laps.append(time.perf_counter())
        info = {"names": names, "dtype_names": dtypes, "shapes": shapes, "ipc_handles": handles}
        self._llm.update_weights({"update_info": info})
        torch.cuda.synchronize()
        laps.append(time.perf_counter())
        self._llm.finish_weight_update()
        torch.cuda.synchronize()
        laps.append(time.perf_counter())
        parts = ("start", "update", "finish")
        return {part: end - begin for part, begin, end in zip(parts, laps, laps[1:], strict=False)}

    def has_module(self, name: str) -> bool:
        """Whether this environment has a module of that name."""
        return find_spec(name) is not None

    def receive(self, addresses: dict[str, str]) -> None:
        """checkpoint-engine's update of every worker, from where its sender listens, by GPU."""
        self._rpc("refit_receive", addresses)

    def generate(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        """Greedy tokens and their log-probabilities, then those of the prompt.

        The first request may use cached prefixes, the second never does.
        """
        from vllm import SamplingParams

        common: dict[str, Any] = {"temperature": 0, "detokenize": False, "ignore_eos": True}
        first = self._one(prompt, SamplingParams(max_tokens=num_tokens, logprobs=0, **common))
        second = self._one(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0, **common))
        tokens = list(first.outputs[0].token_ids)
        return {
            "tokens": tokens,
            "logprobs": [place[token].logprob for place, token in zip(first.outputs[0].logprobs, tokens, strict=True)],
            "prompt_logprobs": [
                place[token].logprob for place, token in zip(second.prompt_logprobs[1:], prompt[1:], strict=True)
            ],
            "num_cached": first.num_cached_tokens,
        }

    def decode(self, prompts: list[list[int]], num_steps: int) -> list[float]:
        """Prefill the prompts, and decode all of them together. Returns the seconds of `num_steps` steps of a token
        each, the first ones left out, while all prompts run.

        A step is over when its tokens are here. Raises RuntimeError where the cache holds fewer prompts at a time.
        """
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        # Those that begin first decode while others are prefilled.
        parameters = SamplingParams(max_tokens=MOST_DECODED, temperature=0, detokenize=False, ignore_eos=True)
        names = [f"decode-{number}" for number in range(len(prompts))]
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        begun: set[str] = set()
        while len(begun) < len(prompts):
            outputs = engine.step()
            if any(each.finished for each in outputs):
                engine.abort_request(names)
                raise RuntimeError(f"{len(begun)} of {len(prompts)} prompts run at a time: the cache has no more room")
            begun.update(each.request_id for each in outputs)
        for _ in range(DECODE_WARMUP):
            engine.step()
        seconds = []
        for _ in range(num_steps):
            began, outputs = time.perf_counter(), []
            while not outputs:  # a scheduler that runs ahead returns nothing at first
                outputs = engine.step()
            seconds.append(time.perf_counter() - began)
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()
        return seconds

    def _one(self, prompt: list[int], parameters: Any) -> Any:
        return self._llm.generate({"prompt_token_ids": prompt}, parameters, use_tqdm=False)[0]

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        return list(self._llm.collective_rpc(method, args=args))


def _rounds_scales() -> bool:
    """Whether vLLM quantises linears of block FP8 again when it loads them, with scales that are powers of two."""
    from vllm.utils import deep_gemm

    return bool(deep_gemm.is_deep_gemm_e8m0_used())


def _stand_in_for_ray() -> None:
    """vLLM's update by CUDA IPC imports ray for one of its ways to be called, which is not used here."""
    if find_spec("ray") is None:
        sys.modules["ray"] = ModuleType("ray")


def reason(error: BaseException) -> str:
    """The error in one line. Errors of vLLM's settings have their text in the middle of several."""
    text = str(error)
    found = re.search(r"(?:Value|Assertion) error, (.*?)(?: \[type=|$)", text, re.DOTALL)
    line = next(iter((found[1] if found else text).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}" if line and not found else line or type(error).__name__


def main() -> None:
    # Linux: the worker module has it too, but imports torch, for which a parent that is gone should not wait.
    import ctypes

    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != int(sys.argv[2]):
        sys.exit(1)
    os.environ["REFIT_ENGINE_PROCESS"] = str(os.getpid())
    connection = Connection(int(sys.argv[1]))
    host: Host | None = None
    answer: Any
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            break
        if method == "stop":
            os._exit(0)  # workers end with this process, and the resource tracker removes what is left
        try:
            if method == "start":
                host = Host(**arguments)
                answer = host.describe()
            else:
                answer = getattr(host, method)(**arguments)
            outcome = "ok"
        except Exception as error:
            import traceback

            traceback.print_exc()
            outcome, answer = "error", reason(error)
        connection.send((outcome, answer))


if __name__ == "__main__":
    main()
