"""The C++ for training as other processors run it: with AVX-512 and bfloat16 but no AMX, with AVX2, and with SSE2.

Each is compiled here and takes the place of the functions for this processor, in tests of every function.
"""

import ctypes
import platform

import pytest

from bitnet_lit.native import build, library
from tests.native import test_kernels as kernels

if platform.machine() != "x86_64":
    pytest.skip("the instruction sets are those of x86", allow_module_level=True)


NEEDS = {"cooperlake": "avx512_bf16", "haswell": "avx2", "x86-64": "sse2"}  # the flag of /proc/cpuinfo


@pytest.fixture(params=NEEDS, scope="module")
def processor(request, tmp_path_factory):
    if NEEDS[request.param] not in build._processor().split():
        pytest.skip(f"this processor has no {NEEDS[request.param]}")
    path = tmp_path_factory.mktemp(request.param) / "training.so"
    flags = [flag for flag in build.FLAGS if flag not in ("-march=native", "-O3")]
    # Without the last flag GCC gives the two libraries of this process their static tables in common.
    flags = [*flags, "-O1", f"-march={request.param}", "-fno-gnu-unique"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "FLAGS", flags)
        try:
            build._Recipe(library.TRAINING).compile(path)
        except build.NoCompilerError as error:
            pytest.skip(str(error))
    of_this_processor = dict(library.functions())
    library.functions().update(library.functions_of(ctypes.CDLL(str(path))))
    yield request.param
    library.functions().update(of_this_processor)


@pytest.mark.parametrize("quant", kernels.SCHEMES[:2] + kernels.SCHEMES[-2:], ids=lambda quant: quant.name)
def test_linears(processor, quant):
    kernels.test_linears(quant, (2, 50), 64, (48, 16, 16))
    kernels.test_linears(quant, (3,), 36, (7,))


def test_gated_mlp(processor):
    kernels.test_gated_mlp(False, True, 48)
    kernels.test_gated_mlp(True, False, 48)


def test_rotary_attention(processor):
    kernels.test_rotary_attention(2, 130, 4, 2, 32)
    kernels.test_rotary_attention(3, 50, 3, 1, 10)


def test_next_token_loss(processor):
    kernels.test_next_token_loss((2, 70), 64, 1000)
    kernels.test_next_token_loss((1, 1), 20, 7)


def test_newton_schulz(processor):
    kernels.test_newton_schulz((2, 150, 40))
    kernels.test_newton_schulz((2, 16, 100))
    kernels.test_newton_schulz((1, 256, 128))
    kernels.test_muons_whole_step(True)


@pytest.mark.parametrize("quant", ["none", "b158", "b1"])
def test_whole_models(processor, quant):
    kernels.test_any_number_of_threads_gives_the_same_bits(quant)
    if quant == "none":
        kernels.test_a_dense_model({"num_attention_heads": 4, "num_key_value_heads": 2})
    else:
        kernels.test_a_quantized_model(quant)


def test_the_integers_are_those_of_this_processor(processor):
    """Losses of a quantized model agree to the rounding of floats, which they would not with other codes."""
    other = kernels.loss_and_gradients("b158", "native")
    with pytest.MonkeyPatch.context() as patch:
        own = library.functions_of(build.library(library.TRAINING))
        patch.setattr(library, "functions", lambda: own)
        mine = kernels.loss_and_gradients("b158", "native")
    kernels.assert_close(other[0], mine[0], atol=0, rtol=1e-3)
