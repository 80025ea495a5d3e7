#!/usr/bin/env python3
"""Is this the environment that docker/versions.env describes?

Prints a table of components: the version expected and found, whether it imports, and the error of one block FP8 GEMM.
Exit status 1, with one line on standard error, where something is wrong; what this machine cannot tell is `skipped`,
with the reason. Runs in the image; on any other machine with --only NAME, for what is installed there.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

VERSIONS = Path(__file__).with_name("versions.env")

# Relative error of a product of two matrices of normal numbers in block FP8: 0.037, with either format of scales. BF16
# has 0.003: what is below the first bound was not computed in FP8.
GEMM_ERROR = (0.01, 0.06)


@dataclass(frozen=True)
class Component:
    """A distribution, the key of its version in versions.env, and modules that must import."""

    distribution: str
    key: str
    modules: tuple[str, ...]
    needs_gpu: bool = False  # its import loads CUDA libraries, or TransformerEngine's


COMPONENTS = (
    Component("sglang", "SGLANG_VERSION", ("sglang.srt.server_args",), needs_gpu=True),
    Component("sglang-router", "SGLANG_ROUTER_VERSION", ("sglang_router.launch_router",)),
    Component("megatron-core", "MEGATRON_VERSION", ("megatron.core.datasets.helpers_cpp",), needs_gpu=True),
    Component("slime", "SLIME_VERSION", ("slime.backends.megatron_utils.actor",), needs_gpu=True),
    Component("mbridge", "MBRIDGE_VERSION", ("mbridge",), needs_gpu=True),
    Component("transformer-engine", "TRANSFORMER_ENGINE_VERSION", ("transformer_engine.pytorch",), needs_gpu=True),
    Component("flash-attn", "FLASH_ATTN_VERSION", ("flash_attn",), needs_gpu=True),
    Component("flash-attn-3", "FLASH_ATTN_3_VERSION", ("flash_attn_3.flash_attn_interface",), needs_gpu=True),
    Component("apex", "APEX_VERSION", ("apex", "amp_C"), needs_gpu=True),
    Component("grouped-gemm", "GROUPED_GEMM_VERSION", ("grouped_gemm",), needs_gpu=True),
    Component("torch-memory-saver", "TORCH_MEMORY_SAVER_VERSION", ("torch_memory_saver",), needs_gpu=True),
    Component("ray", "RAY_VERSION", ("ray",)),
    Component("numpy", "NUMPY_VERSION", ("numpy",)),
    Component("evalscope", "EVALSCOPE_VERSION", ("evalscope",)),
    Component("accelerate", "ACCELERATE_VERSION", ("accelerate",)),
    Component("matplotlib", "MATPLOTLIB_VERSION", ("matplotlib",)),
    Component("numba", "NUMBA_VERSION", ("numba",)),
    Component("tensorboard", "TENSORBOARD_VERSION", ("tensorboard",)),
    Component("wandb", "WANDB_VERSION", ("wandb",)),
    Component("httpx", "HTTPX_VERSION", ("httpx", "h2")),
    Component("pylatexenc", "PYLATEXENC_VERSION", ("pylatexenc",)),
    Component("pybind11", "PYBIND11_VERSION", ("pybind11",)),
)
NAMES = (*(component.distribution for component in COMPONENTS), "cuda", "fp8-gemm")


@dataclass(frozen=True)
class Row:
    name: str
    expected: str
    found: str
    result: str  # ok, skipped: why, or what is wrong

    @property
    def wrong(self) -> bool:
        return self.result != "ok" and not self.result.startswith("skipped")


def read_versions(path: Path = VERSIONS) -> dict[str, str]:
    """The KEY=value lines of versions.env."""
    return dict(word.split("=", 1) for word in shlex.split(path.read_text(), comments=True))


def has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def installed(distribution: str) -> list[str]:
    """Every version of it on sys.path, the one that counts first."""
    try:
        first = version(distribution)
    except PackageNotFoundError:
        return []
    name = normalized(distribution)
    others = {found.version for found in distributions() if normalized(found.metadata["Name"] or "") == name}
    return [first, *sorted(others - {first})]


def normalized(name: str) -> str:
    return name.lower().replace("_", "-")


def beside_transformer_engine() -> str | None:
    """What else could be imported as TransformerEngine: PyPI's parts of it, or a second copy."""
    parts = {normalized(found.metadata["Name"] or "") for found in distributions()}
    parts = sorted(name for name in parts if name.startswith("transformer-engine-"))
    if parts:
        return f"{', '.join(parts)} from PyPI beside it"
    copies = [folder for folder in sys.path if (Path(folder) / "transformer_engine" / "__init__.py").is_file()]
    return f"{len(copies)} copies: {', '.join(copies)}" if len(set(copies)) > 1 else None


def check(component: Component, expected: str, imports: bool, gpu: bool) -> Row:
    """The component's line of the table."""

    def row(result: str) -> Row:
        return Row(component.distribution, expected, ", ".join(found) or "none", result)

    found = installed(component.distribution)
    if found != [expected]:
        return row("another version" if found else "not installed")
    if component.distribution == "transformer-engine" and (other := beside_transformer_engine()):
        return row(other)
    if not imports:
        return row("skipped: import, by --no-import")
    if component.needs_gpu and not gpu:
        return row("skipped: import, no GPU")
    for module in component.modules:
        try:
            importlib.import_module(module)
        except Exception as problem:  # a broken extension raises anything
            return row(f"import {module}: {one_line(problem)}")
    return row("ok")


def one_line(problem: BaseException) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:200]


def check_cuda(minimum: str) -> Row:
    """The CUDA that torch was built for."""
    try:
        import torch
    except ImportError as problem:
        return Row("cuda", f">= {minimum}", "none", one_line(problem))
    found = torch.version.cuda or "none"
    new = found != "none" and [*map(int, found.split("."))] >= [*map(int, minimum.split("."))]
    return Row("cuda", f">= {minimum}", found, "ok" if new else "block FP8 GEMMs need a newer one")


def check_gemm(gpu: bool) -> Row:
    """A product in block FP8 by TransformerEngine against the same in float32."""
    low, high = GEMM_ERROR
    expected = f"error {low}-{high}"
    if not gpu:
        return Row("fp8-gemm", expected, "none", "skipped: no GPU")
    try:
        error = gemm_error()
    except Exception as problem:
        return Row("fp8-gemm", expected, "none", one_line(problem))
    return Row("fp8-gemm", expected, f"error {error:.4f}", "ok" if low < error < high else "not a block FP8 product")


def gemm_error() -> float:
    """Relative error of a linear layer in the recipe's format: 1x128 tiles of inputs, 128x128 blocks of weights."""
    import torch
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling, Format

    torch.manual_seed(0)
    layer = te.Linear(512, 256, bias=False, params_dtype=torch.bfloat16, device="cuda")
    inputs = torch.randn(128, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), te.fp8_autocast(enabled=True, fp8_recipe=Float8BlockScaling(fp8_format=Format.E4M3)):
        product = layer(inputs)
    exact = inputs.float() @ layer.weight.float().t()
    return float((product.float() - exact).norm() / exact.norm())


def table(rows: list[Row]) -> str:
    cells = [("component", "expected", "found", "result")]
    cells += [(row.name, row.expected, row.found, row.result) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, (*widths, 0), strict=True)) for line in cells
    )


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-import", action="store_true", help="versions only")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", default=NAMES, help=", ".join(NAMES))
    options = parser.parse_args()
    versions, gpu, imports = read_versions(), has_gpu(), not options.no_import
    asked = [component for component in COMPONENTS if component.distribution in options.only]
    rows = [check(component, versions[component.key], imports, gpu) for component in asked]
    if "cuda" in options.only:
        rows.append(check_cuda(versions["CUDA_MINIMUM"]))
    if "fp8-gemm" in options.only:
        rows.append(check_gemm(gpu and imports))
    print(table(rows))
    wrong = [row for row in rows if row.wrong]
    if wrong:
        said = "; ".join(f"{row.name}: expected {row.expected}, found {row.found} ({row.result})" for row in wrong)
        print(f"error: {len(wrong)} of {len(rows)} wrong: {said}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
