"""Compile every Triton kernel for every target, with no GPU, and say what each compilation needs.

    python benchmarks/kernel_resources.py            writes docs/kernels.md
    python benchmarks/kernel_resources.py --check    compiles every kernel for one head width, and writes nothing

Exit code 1 where a kernel does not compile or does not fit.

The operators run on small CPU tensors, and each launch is recorded instead of made; so what is compiled is what a GPU
would compile, argument for argument.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from zipvl_compile.kernels import append_tokens as _append
from zipvl_compile.kernels import decode_attention as _decode
from zipvl_compile.kernels import decode_quantised as _decode_few
from zipvl_compile.kernels import decode_quantised_triton as _few
from zipvl_compile.kernels import gather_tokens as _gather
from zipvl_compile.kernels import quantise_tokens as _quantise
from zipvl_compile.kernels import select_tokens as _select
from zipvl_compile.kernels import sparse_attention as _attend
from zipvl_compile.kernels import token_scores as _score
from zipvl_compile.kernels import window_attention_triton as _window
from zipvl_compile.kernels.common import dispatch

TABLE = Path(__file__).parents[1] / "docs" / "kernels.md"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # bytes that one program may have
IN_GRAPH = {_decode.__name__, _few.__name__, _score.__name__}  # Inductor launches these, with Python floats as fp64
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
         torch.uint8: "u8", torch.bool: "i1"}  # fmt: skip


@dataclass
class Launch:
    """One recorded launch: a kernel, the types of its arguments, its constants, its options."""

    kernel: str
    module: str
    case: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: list[str]
    options: dict[str, int]

    @property
    def key(self) -> tuple:
        return (self.kernel, str(self.signature), str(self.constants), str(self.aligned), str(self.options))


def cases() -> dict[str, Callable[[], object]]:
    """Return calls of the operators that cover every kernel and tiling: widths, dtypes, masks, kinds of queries."""
    made: dict[str, Callable[[], object]] = {}
    for name, dtype, width in (
        ("bf16, head_dim 64", torch.bfloat16, 64), ("bf16, head_dim 128", torch.bfloat16, 128),
        ("bf16, head_dim 256", torch.bfloat16, 256), ("bf16, head_dim 80", torch.bfloat16, 80),
        ("fp32, head_dim 128", torch.float32, 128), ("fp32, head_dim 256", torch.float32, 256),
    ):  # fmt: skip
        q = torch.randn(1, 8, 512, width).to(dtype)
        k, v = torch.randn(2, 1, 2, 512, width).to(dtype)
        positions = torch.arange(0, 512, 2).repeat(1, 1, 1)
        keys, values = k[:, :, :300].contiguous(), v[:, :, :300].contiguous()
        row = torch.ones(1, 1, 1, 512, dtype=torch.bool)
        full = torch.zeros(1, 1, 512, 512, dtype=dtype)
        new = q[:, :, :1].contiguous(), k[:, :, :1].contiguous(), v[:, :, :1].contiguous()

        def attend(q, mask, is_causal, every, tiling, keys=keys, values=values, positions=positions):
            return lambda: _attend._attend_triton(
                q, keys, values, positions, mask, is_causal, None, None, every, tiling
            )

        made |= {
            f"{name}, causal": lambda q=q, k=k: _score.token_scores(q, k, kernel="triton"),
            f"{name}, causal + padding": lambda q=q, k=k, m=row: _score.token_scores(q, k, m, kernel="triton"),
            f"{name}, K and V": lambda k=k, v=v, p=positions: _gather.gather_kv(k, v, p, 32, "triton"),
            f"{name}, one token": lambda n=new, k=keys, v=values: _append.append_tokens(k, v, *n[1:], 256, "triton"),
            f"{name}, decode": lambda n=new, k=keys, v=values, p=positions: _decode.decode_attention(
                n[0], k, v, p, 512, 513, kernel="triton"
            ),
            f"{name}, decode with padding": lambda n=new, k=keys, v=values, p=positions: _decode.decode_attention(
                n[0], k, v, p, 512, 513, torch.ones(1, 1, 1, 513, dtype=torch.bool), kernel="triton"
            ),
            f"{name}, decode, static": lambda n=new, k=keys, v=values: _decode.decode_attention(
                n[0],
                k,
                v,
                torch.arange(k.shape[2])[None, None],
                600,
                600,
                torch.ones(1, 1, 1, 600, dtype=torch.bool),
                held=torch.tensor(40),
                kernel="triton",
            ),
        }

        others = torch.arange(1, 512, 2).repeat(1, 1, 1)
        for bits in (8, 4, 2):
            codes = (
                *_quantise.quantise_tokens(k, others, bits, "channel"),
                *_quantise.quantise_tokens(v, others, bits, "token"),
            )
            for kind, mask in (("", None), (" with padding", torch.ones(1, 1, 1, 513, dtype=torch.bool))):
                made[f"{name}, decode, {bits} bits{kind}"] = (
                    lambda n=new, k=keys, v=values, p=positions, c=codes, m=mask: _decode_few.decode_quantised(
                        n[0], k, v, p, 512, 513, *c, m, kernel="triton"
                    )
                )

        def near(mask, every_row, q=q, k=k, v=v, keys=keys, values=values, positions=positions):
            given = (q, k, v, keys, values, positions, torch.arange(4)[None], mask)
            return lambda: _window.attend_window_triton(*given, True, None, None, 64, True, every_row)

        for kind, mask in (("causal", None), ("causal + padding row", row), ("additive mask", full)):
            made[f"{name}, {kind}, window"] = near(mask, False)
            made[f"{name}, {kind}, window, every row"] = near(mask, True)
        for tiling in _attend.tilings(q, v, None):
            made[f"{name}, causal, {tiling}"] = attend(q, None, True, False, tiling)
        for tiling in _attend.tilings(q, v, row):
            made[f"{name}, causal + padding row, {tiling}"] = attend(q, row, True, False, tiling)
        for tiling in _attend.tilings(q, v, full):
            made[f"{name}, additive mask, {tiling}"] = attend(q, full, False, False, tiling)
        best = _attend.tilings(q, v, None)[0]
        made[f"{name}, causal, kept queries only"] = attend(q[:, :, :256].contiguous(), None, True, False, best)
        made[f"{name}, causal, all queries"] = attend(q, None, True, True, best)
    for n in (1024, 8192, 16384, 32768):
        scores, seen = torch.rand(1, 1, n), torch.ones(1, n)
        for name, rule in ((f"{n} tokens", {"tau": 0.5}), (f"{n} tokens, ratio", {"keep_ratio": 0.5})):
            made[name] = lambda s=scores, v=seen, r=rule: _select.select_tokens(s, v, kernel="triton", **r)
    return made


def record() -> list[Launch]:
    """Return the distinct launches of all cases."""
    found: dict[tuple, Launch] = {}
    case = ""

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        options = {name: given.pop(name) for name in ("num_warps", "num_stages") if name in given}
        signature, constants, aligned = {}, {}, []
        for parameter in self.params:
            name, value = parameter.name, given[parameter.name]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                aligned.append(name)
            elif isinstance(value, float):
                signature[name] = "fp64" if self.__module__ in IN_GRAPH else "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    aligned.append(name)
        if self.__name__ == "_fewest_tokens_kernel":  # nothing runs, and the host reads a size from this result
            given["out"].fill_(200)
        launch = Launch(self.__name__, self.__module__, case, signature, constants, aligned, options)
        found.setdefault(launch.key, launch)

    original, JITFunction.run = JITFunction.run, run
    unsupported, dispatch._unsupported = dispatch._unsupported, lambda tensors: ""
    try:
        for case, call in cases().items():  # noqa: B007  (run reads it)
            call()
    finally:
        JITFunction.run, dispatch._unsupported = original, unsupported
    return list(found.values())


def compiled(job: tuple[Launch, str]) -> dict[str, Any]:
    """Compile a launch for a target; return its row of the table, or the error."""
    launch, target = job
    kernel = getattr(sys.modules[launch.module], launch.kernel)
    places = {name: i for i, name in enumerate(kernel.arg_names)}
    attributes = {(places[name],): [["tt.divisibility", 16]] for name in launch.aligned}
    amd = target.startswith("gfx")
    limits = {"num_stages": 2, "num_warps": 16} if amd else {}  # as tiles.pipelined and select_tokens._tiling say
    options = launch.options | {name: min(launch.options.get(name, most), most) for name, most in limits.items()}
    row = {"kernel": launch.kernel, "case": launch.case, "target": target, **launch.options}
    try:
        constants = {(places[name],): value for name, value in launch.constants.items()}
        source = ASTSource(kernel, launch.signature, constants, attributes)
        built = triton.compile(source, target=TARGETS[target], options=options)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    usage = _amd(built.asm["amdgcn"]) if amd else _nvidia(built.asm["cubin"])
    return row | usage | {"shared": built.metadata.shared}


def _nvidia(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": numbers["REG"], "spills": numbers["STACK"] + numbers["LOCAL"]}


def _amd(assembly: str) -> dict[str, int]:
    numbers = {name: int(value) for name, value in re.findall(r"\.(\w+_count|\w+_size):\s+(\d+)", assembly)}
    return {"registers": numbers["vgpr_count"], "spills": numbers["vgpr_spill_count"]}


def _too_large(launch: Launch, target: str) -> bool:
    """Return whether the tiling is one that `tilings` does not offer on the target."""
    tile = [launch.constants.get(name, 0) for name in ("BLOCK_N", "BLOCK_D")]
    wide = launch.kernel == "_sparse_attention_kernel" and tile[0] == 128 and tile[1] == 128
    return target.startswith("gfx") and wide


def rows(check: bool) -> Iterator[dict[str, Any]]:
    launches = [x for x in record() if not check or "head_dim" not in x.case or "bf16, head_dim 128" in x.case]
    jobs = [(launch, target) for launch in launches for target in TARGETS if not _too_large(launch, target)]
    with ProcessPoolExecutor() as pool:
        yield from pool.map(compiled, jobs, chunksize=4)


def main(check: bool) -> int:
    table, failed = [], []
    for row in rows(check):
        if "error" in row or row["shared"] > SHARED_LIMIT[row["target"]]:
            failed.append(row)
        table.append(row)
    for row in failed:
        print("FAILED", row)
    if not check and not failed:
        TABLE.write_text(as_markdown(table))
    print(f"{len(table)} compilations, {len(failed)} failed, Triton {triton.__version__}")
    return bool(failed)


def as_markdown(table: list[dict[str, Any]]) -> str:
    lines = [
        "# Triton kernels: registers, spills and shared memory",
        "",
        f"Made by `python benchmarks/kernel_resources.py`, Triton {triton.__version__}, without a GPU: what the",
        "compilers report, not a measurement. Registers are per thread (VGPRs on gfx942), spills in bytes per thread",
        "(registers on gfx942), shared memory in KiB per program. On gfx942 at most two stages and 16 warps are used.",
        "",
    ]
    for kernel in dict.fromkeys(row["kernel"] for row in table):
        lines += [f"## `{kernel.removeprefix('_').removesuffix('_kernel')}`", ""]
        lines += ["| case | warps | stages | " + " | ".join(f"{t}: registers, spills, shared" for t in TARGETS) + " |"]
        lines += ["|---|---|---|" + "---|" * len(TARGETS)]
        mine = [row for row in table if row["kernel"] == kernel]
        for case in dict.fromkeys((row["case"], row.get("num_warps"), row.get("num_stages")) for row in mine):
            group = {r["target"]: r for r in mine if (r["case"], r.get("num_warps"), r.get("num_stages")) == case}
            first = next(iter(group.values()))
            cells = [
                f"{r['registers']}, {r['spills']}, {r['shared'] / 1024:.1f}" if (r := group.get(target)) else "not used"
                for target in TARGETS
            ]
            options = [str(first.get(name, "default")) for name in ("num_warps", "num_stages")]
            lines.append("| " + " | ".join([first["case"], *options, *cells]) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main("--check" in sys.argv))
