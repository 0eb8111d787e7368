"""The scheme as an object: what it says of itself, how it is found again, and that nobody goes by its name."""

import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn

from bitnet_lit.cli import compose
from bitnet_lit.config import QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.model.accounting import account
from bitnet_lit.quant import BitLinear, PackedBitLinear, Scheme, convert_linears, pack_linears, register, scheme_named
from bitnet_lit.quant.bit_linear import bit_linear_reference
from bitnet_lit.quant.scheme import is_skipped
from bitnet_lit.quant.schemes import (
    B1,
    B158,
    SCHEMES,
    B158Group,
    B158Row,
    BitNetV2,
    Dense,
    LearnedB158,
    Sherry,
    Tequila,
)
from bitnet_lit.quant.weights import AbsMean, AbsMedian, PerGroup, PerRow, PerTensor, Sign, spread_scale
from tests.quant.toy_schemes import Centered, CenteredLinear, Gained, GainedLinear, Quinary, Threshold
from tests.support import REPOSITORY, tiny_config

OURS = [B158(), B158("absmedian", 4), B158Row(), B158Row("absmedian"), B158Group(group_size=8), B1(), Dense()]
OURS += [LearnedB158(), LearnedB158("absmedian", per_row=True)]
OURS += [Sherry(), Tequila(), BitNetV2(activation_bits=4), BitNetV2(hadamard=False, activation_scale="absmax")]
TOYS = [Threshold(), Threshold(factor=0.5), Quinary(), Centered()]


@pytest.fixture(autouse=True)
def toys_are_known():
    for cls in (Threshold, Quinary, Centered):
        register(cls)


@pytest.mark.parametrize("scheme", OURS + TOYS, ids=str)
def test_a_description_is_plain_data_and_gives_the_scheme_back(scheme):
    described = scheme.describe()
    assert all(type(value) in (str, int, float, bool) for value in described.values())
    name = described.pop("name")
    assert scheme_named(name, described) == scheme
    config = QuantConfig.described({"name": name, **described, "skip": ["lm_head", "o_proj"]})
    assert config.scheme == scheme and config.skip == ["lm_head", "o_proj"]
    assert QuantConfig.described(config.describe()) == config


def test_what_the_first_version_saved_is_read():
    """Warm-up and all, and every key for every scheme, whether it has the setting or not."""
    for name, scheme in (("b158", B158()), ("b1", B1()), ("none", Dense())):
        saved = {"name": name, "weight_scale": "absmean", "activation_bits": 8, "lambda_warmup_steps": 7}
        config = QuantConfig.described({**saved, "lambda_warmup_shape": "cosine", "skip": ["lm_head"]})
        assert config.describe() == QuantConfig(name=name).describe() and config.scheme == scheme
    saved = {"name": "b158", "weight_scale": "absmedian", "activation_bits": 4, "skip": []}
    assert QuantConfig.described(saved).scheme == B158("absmedian", 4)


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        ({"name": "nobody.knows"}, "quant.name=nobody.knows: must be one of b158"),
        ({"name": "b158", "group_size": 64}, "quant=b158: has no setting group_size"),
        ({"name": "b158", "_target_": "os.system"}, "quant=b158: has no setting _target_"),
        ({"name": "b1", "weight_scale": "absmedian"}, "quant=b1: has no setting weight_scale"),
        ({"name": "b158", "weight_scale": "mean"}, "quant.weight_scale=mean: must be one of absmean, absmedian"),
        ({"name": "b158", "activation_bits": True}, "activation_bits=True: must be a whole number"),
        ({"name": "b158", "activation_bits": 9}, "must lie in 2..8"),
        ({"name": "b158_group", "group_size": 64.0}, "group_size=64.0 must be of type int"),
        ({"name": "b158_group", "group_size": 1}, "group_size=1: must be 2 or more"),
        ({"name": "threshold", "factor": float("nan")}, "factor=nan must be of type float"),
        ({"name": "bitnet_v2", "activation_scale": "mean"}, "activation_scale=mean: must be one of absmean, absmax"),
        ({"name": "sherry", "weight_scale": "absmedian"}, "quant=sherry: has no setting weight_scale"),
        ({"name": "b158", "skip": "lm_head"}, "skip='lm_head': must be a list of names"),
    ],
    ids=str,
)
def test_a_description_that_does_not_fit_is_one_line(saved, says):
    with pytest.raises(UserError) as error:
        QuantConfig.described({"skip": [], **saved})
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_scheme_checks_its_own_settings_too():
    with pytest.raises(UserError, match="activation_bits=True must be of type int"):
        scheme_named("b158", {"activation_bits": True})
    for cls in (B158, B158Row, B158Group, B1):
        with pytest.raises(UserError, match="activation_bits=9: must lie in 2..8"):
            cls(activation_bits=9)


def test_a_class_of_ones_own_is_named_by_its_user_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "raises.py").write_text("\nraise KeyError('boom')\n")
    (tmp_path / "unfinished.py").write_text("Scheme = (\n")
    config = QuantConfig(_target_="tests.quant.toy_schemes.Threshold", settings={"factor": 0.5})
    assert config.name == "threshold" and config.scheme.factor == 0.5 and "_target_" not in config.describe()
    for target, says in (
        ("no_such_module.Scheme", "cannot be imported"),
        ("tests.quant.toy_schemes.Nothing", "cannot be imported"),
        ("raises.Scheme", r"cannot be imported \(KeyError: 'boom', raises.py line 2\)"),
        ("unfinished.Scheme", "cannot be imported .SyntaxError"),
        ("pathlib.Path", r"^pathlib\S*.Path is no quantization scheme: derive it from \S+.Scheme and give it a name$"),
        ("bitnet_lit.quant.schemes.register", "is no quantization scheme"),
    ):
        with pytest.raises(UserError, match=says):
            QuantConfig(_target_=target)
    with pytest.raises(UserError, match="activation_bits.*has a key of its own"):
        QuantConfig(settings={"activation_bits": 4})


@pytest.mark.parametrize("command", ["train", "infer", "evaluate", "export"])
def test_commands_that_open_a_model_import_what_their_user_names(command, monkeypatch):
    known = {name: cls for name, cls in SCHEMES.registered.items() if cls not in (Threshold, Quinary, Centered)}
    monkeypatch.setattr(SCHEMES, "registered", known)
    options = ["run_dir=x"] if command == "train" else []
    with pytest.raises(UserError, match=r"schemes=\[my.Missing\]: cannot be imported"):
        compose(command, [*options, "schemes=[my.Missing]"])
    with pytest.raises(UserError, match="quant.name=threshold: must be one of"):
        scheme_named("threshold")
    compose(command, [*options, "schemes=[tests.quant.toy_schemes.Threshold]"])
    assert scheme_named("threshold") == Threshold()


def test_one_name_one_class():
    @dataclass(frozen=True)
    class Another(Scheme):
        name = "b158"
        title = "not it"

        @property
        def weights(self):
            return AbsMean()

    with pytest.raises(UserError, match=r"b158: bitnet_lit.quant.schemes.B158 has this name"):
        register(Another)
    assert type(scheme_named("b158")) is B158


def entry_point(value, name="mine", group="bitnet_lit.schemes"):
    return {name: EntryPoint(name=name, value=value, group=group)}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("tests.quant.toy_schemes:Threshold", "whose own name is threshold: take quant.name=threshold"),
        ("no_such_module:Scheme", "names no_such_module:Scheme for it, which cannot be imported"),
        ("pathlib:Path", "is no quantization scheme"),
    ],
)
def test_a_package_that_names_a_scheme_wrongly_is_one_line(monkeypatch, value, message):
    monkeypatch.setattr(SCHEMES, "registered", dict(SCHEMES.registered))
    monkeypatch.setattr(SCHEMES, "_installed", entry_point(value))
    with pytest.raises(UserError, match=message) as error:
        scheme_named("mine")
    assert "\n" not in str(error.value)


def test_a_scheme_of_an_installed_package_is_known_by_its_name(monkeypatch):
    known = {name: cls for name, cls in SCHEMES.registered.items() if name != "threshold"}
    monkeypatch.setattr(SCHEMES, "registered", known)
    monkeypatch.setattr(SCHEMES, "_installed", entry_point("tests.quant.toy_schemes:Threshold", "threshold"))
    assert "threshold" in SCHEMES.names and scheme_named("threshold") == Threshold()


def test_a_setting_must_not_have_the_name_of_another_key():
    @dataclass(frozen=True)
    class Skipping(Scheme):
        name = "skipping"
        title = "loses its skip when it is saved"
        skip: int = 1

        @property
        def weights(self):
            return AbsMean()

    with pytest.raises(UserError, match="its setting skip has the name of another key"):
        register(Skipping)


def test_bits_levels_and_scales():
    said = {
        scheme: (scheme.levels, scheme.granularity, scheme.is_ternary, scheme.bits_per_weight(64, 256))
        for scheme in OURS
    }
    log3 = 1.584962500721156
    assert said[B158()] == ((-1, 0, 1), PerTensor(), True, log3 + 32 / (64 * 256))
    assert said[B158Row()] == ((-1, 0, 1), PerRow(), True, log3 + 32 / 256)
    assert said[B158Group(group_size=8)] == ((-1, 0, 1), PerGroup(8), True, log3 + 32 / 8)
    assert said[B1()] == ((-1, 1), PerTensor(), True, 1 + 32 / (64 * 256))
    assert said[Sherry()] == ((-1, 0, 1), PerTensor(), True, 1.25 + 32 / (64 * 256))
    assert said[Tequila()] == ((-1, 0, 1), PerTensor(), True, log3 + 32 / (64 * 256) + 32 / 256)  # 64 biases
    assert said[Dense()] == ((), PerTensor(), False, 32.0)
    assert not Quinary().is_ternary and not Centered().is_plain and Threshold().is_plain


@pytest.mark.parametrize("scheme", OURS + TOYS, ids=str)
def test_a_model_of_any_scheme_is_counted(scheme):
    config = tiny_config()  # hidden 32, feed-forward 64, two layers
    quant = QuantConfig.described({**scheme.describe(), "skip": ["lm_head"]})
    shapes = [(32, 32)] * 4 + [(64, 32)] * 2 + [(32, 64)]
    if scheme.quantizes:
        scales = sum(torch.ones(scheme.weights.quantize(torch.randn(shape))[1].shape).numel() for shape in shapes)
        if scheme == Tequila():
            scales += sum(rows for rows, _ in shapes)  # biases
        expected = scheme.code_bits + 32 * scales / sum(rows * inputs for rows, inputs in shapes)
    else:
        expected = 32.0
    assert account(config, quant).bits_per_weight == pytest.approx(expected, rel=1e-12)


def test_groups_that_do_not_fill_a_row_are_one_line_and_change_nothing():
    model = nn.ModuleDict({"a": nn.Linear(128, 8), "b": nn.Linear(96, 8)})
    with pytest.raises(UserError, match=r"b: rows of 96 inputs do not divide into groups of 64.*skip=\['b'\]"):
        convert_linears(model, B158Group(group_size=64))
    assert type(model["a"]) is nn.Linear
    assert convert_linears(model, B158Group(group_size=64), skip=["b"]) == ["a"]
    with pytest.raises(UserError, match="^b: rows of 30 inputs do not divide into blocks of 4 weights"):
        convert_linears(nn.ModuleDict({"b": nn.Linear(30, 8)}), Sherry())
    with pytest.raises(UserError, match="rows of 30 inputs do not divide into blocks of 4"):
        account(tiny_config(hidden_size=30, num_attention_heads=3), QuantConfig(name="sherry"))
    with pytest.raises(UserError, match="do not divide into groups of 24"):
        account(tiny_config(), QuantConfig(name="b158_group", settings={"group_size": 24}))


@pytest.mark.parametrize("rule", [AbsMean, AbsMedian])
def test_rows_and_groups_are_rounded_as_matrices_of_their_own(rule):
    torch.manual_seed(0)
    weight = torch.randn(6, 32) * torch.rand(6, 1)
    for granularity, parts in ((PerRow(), 1), (PerGroup(8), 4), (PerGroup(32), 1)):
        codes, scale = rule(granularity).quantize(weight)
        assert scale.shape == granularity.scale_shape(6, 32) == (6, parts)
        for row in range(6):
            for part, piece in enumerate(weight[row].split(32 // parts)):
                own_codes, own_scale = rule().quantize(piece[None])
                assert torch.equal(codes[row].split(32 // parts)[part], own_codes[0])
                torch.testing.assert_close(scale[row, part], own_scale, rtol=2**-22, atol=0)  # sums in another order
        spread = spread_scale(scale, 32).expand(6, 32)
        assert torch.equal(spread, scale.repeat_interleave(32 // parts, 1))


def test_statistics_are_of_rules_that_two_numbers_describe():
    torch.manual_seed(0)
    weight = torch.randn(8, 16)
    for rule in (AbsMean(), AbsMedian(), Sign()):
        scale, center = rule.statistics(weight)
        assert scale == rule.quantize(weight)[1] and center == (weight.mean() if rule == Sign() else 0)
    for rule in (AbsMean(PerRow()), AbsMedian(PerGroup(8)), Quinary().weights, Threshold().weights):
        assert rule.statistics(weight) is None


@pytest.mark.parametrize(
    "scheme",
    [B158Row(), B158Group(group_size=16), B158(), Sherry(), LearnedB158(per_row=True), Threshold(), Quinary()],
    ids=str,
)
def test_trained_and_packed_layers_agree_bit_for_bit_gradients_included(scheme):
    for seed in range(5):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(48, 16))
        convert_linears(module, scheme)
        layer = module[0]
        for name in scheme.own_tensors(16, 48):
            nn.init.uniform_(getattr(layer, name), 0.5, 2)
        packed = PackedBitLinear.from_bit_linear(layer)
        results = []
        for module in (layer, packed):
            x = torch.randn(5, 48, generator=torch.Generator().manual_seed(seed)).requires_grad_()
            y = module(x)
            y.square().sum().backward()
            results.append((y, x.grad))
            with torch.no_grad():
                assert torch.equal(module(x), y)
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)
        assert packed.weight.dtype == (torch.uint8 if scheme.is_ternary else torch.int8)


def broken(x):
    torch._dynamo.graph_break()
    return x


@pytest.fixture
def dynamo(monkeypatch):
    """torch.compile compiles here; the other tests have it switched off."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    with torch._dynamo.config.patch(disable=False):
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):  # so a break is seen
            torch.compile(broken, fullgraph=True, backend="eager")(torch.zeros(()))
        yield


def output_and_gradients(module, dtype):
    """What a module computes of fixed inputs, and the gradients of the inputs and of its parameters."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = module(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *parameters])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "scheme",
    [
        B158("absmedian"),
        B158Row("absmedian"),
        B158(),
        B158Row(),
        B158Group(group_size=16),
        Sherry(),
        Tequila(),
        BitNetV2(activation_bits=4),
        LearnedB158(per_row=True),
        Quinary(),
        Centered(),
    ],
    ids=str,
)
def test_compiled_code_has_no_breaks_and_the_same_gradients(scheme, dtype, dynamo):
    torch.manual_seed(0)
    module = nn.ModuleDict({"o_proj": nn.Linear(32, 16, bias=False)})
    convert_linears(module, scheme)
    module = module["o_proj"]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for found, expected in zip(output_and_gradients(compiled, dtype), output_and_gradients(module, dtype), strict=True):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(found, expected)


def test_gradients_pass_through_packed_layers_in_compiled_code(dynamo):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 16, bias=False))
    convert_linears(module, "b158", skip=["0"])
    pack_linears(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    pairs = zip(output_and_gradients(compiled, None), output_and_gradients(module, None), strict=True)
    for found, expected in pairs:
        assert expected.abs().sum() > 0
        torch.testing.assert_close(found, expected)


def test_a_layer_keeps_its_own_tensors_and_the_hooks_of_the_old_one():
    linear = nn.Linear(16, 8)
    seen = []
    handle = linear.register_forward_hook(lambda *_: seen.append(1))
    linear.register_buffer("kept", torch.tensor([3.0]))
    module, x = nn.Sequential(linear), torch.randn(2, 16)
    assert convert_linears(module, Gained()) == ["0"]
    layer = module[0]
    assert set(layer.state_dict()) == {"weight", "bias", "gain", "constant", "kept"}
    plain = BitLinear.from_linear(linear, "b158")
    assert torch.equal(module(x), plain(x) * 0.5) and seen == [1]
    handle.remove()
    module(x)
    assert seen == [1]


def test_a_tensor_that_a_layer_makes_on_the_meta_device_is_named():
    class OnMeta(GainedLinear):
        def __init__(self, *sizes, **options):
            super().__init__(*sizes, **options)
            self.gain = nn.Parameter(torch.ones(self.out_features, device=options["device"]))

    @dataclass(frozen=True)
    class Meta(Gained):
        layer = OnMeta

    with pytest.raises(UserError, match="^0: its layer makes gain on the meta device: make it without device="):
        convert_linears(nn.Sequential(nn.Linear(16, 8)), Meta())


def test_a_layer_of_ones_own_is_used_and_is_not_packed():
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16)), torch.randn(4, 32) + 3
    assert convert_linears(module, Centered()) == ["0", "2"]
    assert type(module[0]) is CenteredLinear
    layer = module[0]
    expected = bit_linear_reference(x - x.mean(-1, keepdim=True), layer.weight, layer.bias, B158())
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)  # scales before or after the product
    assert pack_linears(module) == [] and type(module[0]) is CenteredLinear


def test_skipped_names():
    assert is_skipped("a.b.lm_head", ["lm_head"]) and is_skipped("a.b", ["a.b"])
    assert not is_skipped("my_lm_head", ["lm_head"])


def test_a_scheme_needs_no_torch():
    """The native engine opens a model without it."""
    code = "import sys, bitnet_lit.config as c; c.QuantConfig().scheme; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


NAME = r"""['"](b158\w*|b1|none)['"]"""
COMPARISON = re.compile(
    rf"quant\.name\s*[!=]=|scheme\.name\s*[!=]=|\bname\s*[!=]=\s*{NAME}|[!=]=\s*{NAME}|\bin\s*[(\[]\s*{NAME}"
)


def test_nobody_goes_by_a_schemes_name():
    """Ask the scheme what it is; its name stands in its own file, in configs, and where one is made."""
    sources = [path for path in Path(REPOSITORY, "src").rglob("*.py") if path.name != "scheme.py"]
    assert len(sources) > 50
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"
        for path in sources
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if COMPARISON.search(line)
    ]
    assert found == []
    for line in ('if quant.name == "none":', 'x = name != "b1"', 'if q in ("b158", "b1"):'):
        assert COMPARISON.search(line)


def test_a_scheme_that_names_a_class_for_some_layers_is_not_plain():
    class Partly(B158):
        def layer_for(self, name):
            return CenteredLinear if name.endswith("o_proj") else None

    assert not Partly().is_plain and B158().is_plain and scheme_named("b158_learned").is_plain
