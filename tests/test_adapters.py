"""Adapters of other programs: what is said about them is true, and what is read of them is right."""

import json
import struct
import subprocess
import sys

import pytest
import torch
from adapter_zoo import ALPHA, META, RANK, Zoo, layers_of, rand, raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from lora_mvp.errors import LoraMvpError
from lora_mvp.models.adapters import fuse, set_scale
from lora_mvp.models.base import load_base
from lora_mvp.models.inspection import describe, inspect_adapter
from lora_mvp.models.miniatures import random_base
from lora_mvp.models.reading import load_lora


class Home:
    """A base and the animals that were made for it."""

    def __init__(self, family, folder):
        self.root = str(random_base(family, folder / "base"))
        (folder / "zoo").mkdir()
        pipe = load_base(self.root)
        self.zoo = Zoo(pipe, folder / "zoo")
        self.files = self.zoo.readable()
        self.before = {name: layer.weight.detach().clone() for name, layer in layers_of(pipe).items()}
        self.kept = pipe

    def fresh(self):
        """The base as it was, without an adapter; loaded once, since a load takes longer than all that is done with it."""
        with torch.no_grad():
            for name, layer in layers_of(self.kept).items():
                layer.weight.copy_(self.before[name])
        return self.kept

    def is_right(self, animal, after, share=1e-4):
        """Whether every layer has moved as the animal says, and no other."""
        for name, weight in after.items():
            moved, wanted = weight - self.before[name], self.zoo.deltas[animal].get(name, torch.zeros(1))
            if float((moved - wanted).abs().max()) > share * max(float(wanted.abs().max()), 1e-3):
                return False
        return True

    def weights(self, pipe):
        return {name: layer.weight.detach() for name, layer in layers_of(pipe).items()}


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return Home("sd1", tmp_path_factory.mktemp("sd1"))


@pytest.fixture(
    scope="module", params=["sd1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd2", "sdxl"))]
)
def home(request, tmp_path_factory):
    if request.param == "sd1":
        return request.getfixturevalue("sd1")
    return Home(request.param, tmp_path_factory.mktemp(request.param))


def test_every_form_is_read_at_its_strength(home):
    for animal, file in home.files.items():
        pipe = home.fresh()
        load_lora(pipe, file)
        facts = inspect_adapter(file)
        assert facts.strength and facts.strength[0] > 0, animal
        fuse(pipe)
        assert home.is_right(animal, home.weights(pipe)), animal


def test_half_the_strength_is_half_the_change(sd1):
    for animal in ("loha", "lokr", "tucker", "dora_cols", "kohya"):
        pipe = sd1.fresh()
        load_lora(pipe, sd1.files[animal])
        fuse(pipe, 0.5)
        after = sd1.weights(pipe)
        twice = {name: sd1.before[name] + 2 * (after[name] - sd1.before[name]) for name in after}
        assert sd1.is_right(animal, twice), animal
    pipe = sd1.fresh()
    load_lora(pipe, sd1.files["loha"])
    set_scale(pipe, 0)
    fuse(pipe, 0)
    assert all(torch.equal(value, sd1.before[name]) for name, value in sd1.weights(pipe).items())


def diffusers_does(home, animal, file) -> bool:
    """Whether diffusers' own loader makes the right weights of a file."""
    pipe = home.fresh()
    try:
        pipe.load_lora_weights(str(file), adapter_name="x")
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        return home.is_right(animal, home.weights(pipe))
    except Exception:  # a refusal has many types, and leaves half of an adapter behind
        home.kept = load_base(home.root)
        return False


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")  # what it says of several alphas
def test_what_is_said_of_diffusers_is_what_diffusers_does(home):
    """Yes must mean the right weights, and no anything else."""
    said = {animal: inspect_adapter(file).readers["diffusers"] for animal, file in home.files.items()}
    for animal, file in home.files.items():
        done = diffusers_does(home, animal, file)
        assert said[animal] is None or said[animal] == done, (animal, said[animal], done)
    assert said["kohya"] and said["diffusers"] and said["processors"] and not said["loha"]  # no hiding behind unknown
    assert sum(answer is None for answer in said.values()) <= 2


U = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
D = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
FIRST = torch.ones(RANK, 768), torch.ones(320, RANK)


def pair(key, i=768, o=320, alpha=ALPHA):
    tensors = {f"{key}.lora_down.weight": rand(RANK, i), f"{key}.lora_up.weight": rand(o, RANK)}
    return tensors | ({} if alpha is None else {f"{key}.alpha": torch.tensor(alpha)})


K = pair(f"{U}attn2_to_k")


def ab(key, i):
    return {f"{key}.lora_A.weight": rand(RANK, i), f"{key}.lora_B.weight": rand(320, RANK)}


AB = {f"{D}.lora_A.weight": FIRST[0], f"{D}.lora_B.weight": FIRST[1]}
SETTINGS = {"unet.r": RANK, "unet.lora_alpha": 8, "unet.target_modules": ["to_k"]}


def kohya_with(**changes):
    return {
        name: changes.get(name.rsplit(".", 1)[-1] if name.endswith("alpha") else name.split(".")[1], value)
        for name, value in K.items()
    }


NAMED = {  # an adapter with something about it -> tensors, metadata, what is said, whether any program may be said to load it
    "glora": ({f"{U}attn2_to_k.{n}.weight": rand(RANK, 8) for n in ("a1", "a2", "b1", "b2")}, None, "GLoRA", False),
    "ia3": (
        {f"{U}attn2_to_k.weight": rand(320, 1), f"{U}attn2_to_k.on_input": torch.tensor(False)},
        None,
        "IA3",
        False,
    ),
    "norm": (K | {"lora_unet_down_blocks_0_attentions_0_norm.w_norm": rand(320)}, None, "norm layers", True),
    "oft": ({f"{U}attn1_to_q.oft_blocks": rand(4, 8, 8)}, None, "OFT", False),
    "full": ({f"{U}attn1_to_q.diff": rand(320, 320)}, None, "full differences", False),
    "bundle": (K | {"bundle_emb.word.string_to_param.*": rand(2, 768)}, None, "1 embeddings", True),
    "down_only": (
        {k: v for k, v in K.items() if "up" not in k} | pair(f"{U}attn1_to_q", 320),
        None,
        "without all",
        False,
    ),
    "up_only": (
        {k: v for k, v in K.items() if "lora_down" not in k} | pair(f"{U}attn1_to_q", 320),
        None,
        "without all",
        False,
    ),
    "rank0": (kohya_with(lora_down=torch.zeros(0, 768), lora_up=torch.zeros(320, 0)), None, "of rank 0", False),
    "zeros": (kohya_with(lora_up=torch.zeros(320, RANK)), None, "changes nothing, because its numbers are all 0", True),
    "alpha0": (kohya_with(alpha=torch.tensor(0.0)), None, "changes nothing, because alpha is 0", True),
    "alpha2": (kohya_with(alpha=torch.tensor([1.0, 2.0])), None, "alpha is not one number", False),
    "nan": (kohya_with(lora_up=torch.full((320, RANK), torch.nan)), None, f"lora_up.weight: {320 * RANK} NaN", False),
    "nan_alpha": (kohya_with(alpha=torch.tensor(torch.nan)), None, "alpha: 1 NaN", False),
    "inf": (kohya_with(lora_up=torch.tensor([[torch.inf] * RANK] * 320).bfloat16()), None, "1280 infinite", False),
    "null_alpha": (
        AB,
        {META: json.dumps(SETTINGS | {"unet.lora_alpha": None})},
        "unet.lora_alpha in the header is null",
        False,
    ),
    "str_alpha": (
        AB,
        {META: json.dumps(SETTINGS | {"unet.lora_alpha": "8"})},
        'unet.lora_alpha in the header is "8"',
        False,
    ),
    "null_pattern": (AB, {META: json.dumps(SETTINGS | {"unet.alpha_pattern": None})}, "unet.alpha_pattern in", False),
    "bad_json": (AB, {META: "{not json"}, "is damaged", False),
    "list": (AB, {META: "[1, 2]"}, "is damaged", False),
    "superscript": (K, {"ss_steps": "²"}, "!steps", True),
    "other_digits": (K, {"ss_steps": "١٢"}, "!steps", True),
    "ansi": (
        K,
        {"modelspec.trigger_phrase": "t\x1b[31m\nloads in  everything"},
        r"t\x1b[31m\nloads in  everything",
        True,
    ),
    "flux": (
        ab("transformer.single_transformer_blocks.0.attn.to_q", 3072),
        None,
        "FLUX",
        True,
    ),
    "flux_kohya": (pair("lora_unet_double_blocks_0_img_attn_qkv", 3072, 9216), None, "FLUX", True),
    "flux_bfl": (
        ab("diffusion_model.double_blocks.0.img_attn.qkv", 3072),
        None,
        "FLUX",
        True,
    ),
    "sd3": (
        ab("transformer.transformer_blocks.0.attn.to_q", 1536),
        None,
        "Stable Diffusion 3",
        True,
    ),
    "zimage": (ab("transformer.layers.0.attention.to_q", 3840), None, "Z-Image", True),
    "zimage_comfyui": (ab("diffusion_model.layers.29.attention.to_out.0", 3840), None, "Z-Image", True),
    "lumina2": (ab("transformer.layers.0.attn.to_q", 2304), None, "a diffusion transformer", False),
    "flux2": (ab("transformer.single_transformer_blocks.0.attn.to_q", 6144), None, "a diffusion transformer", False),
    "hunyuan": (ab("transformer.double_blocks.0.img_attn_qkv", 3072), None, "a diffusion transformer", False),
    "hunyuan_kohya": (pair("lora_unet_single_blocks_38_linear1", 3072), None, "a diffusion transformer", False),
    "mochi": (
        ab("transformer.transformer_blocks.0.attn.to_q", 3072)
        | ab("transformer.transformer_blocks.0.attn.add_q_proj", 1536),
        None,
        "a diffusion transformer",
        False,
    ),
    "language_model": (ab("base_model.model.model.layers.0.self_attn.q_proj", 64), None, "base      unknown", False),
    "text_of_old": (
        {
            f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.{n}.weight": rand(*s)
            for n, s in (("down", (RANK, 768)), ("up", (768, RANK)))
        },
        None,
        "unknown: diffusers",
        False,
    ),
    "apart": (kohya_with(lora_up=rand(320, 2 * RANK)), None, "do not fit together", False),
    "flat": (kohya_with(lora_up=rand(320)), None, "do not fit together", False),
    "whole_numbers": (kohya_with(lora_up=torch.ones(320, RANK, dtype=torch.int8)), None, "hold whole numbers", False),
    "left_over": (K | {"clip_l": rand(2, 768)}, None, "1 tensors of no known kind", False),
    "differences": (K | {f"{U}attn2_to_k.diff_b": rand(320)}, None, "LoRA and full differences", True),
    "other_rank": (AB, {META: json.dumps(SETTINGS | {"unet.r": 64})}, "the settings name rank 64 for unet", False),
    "no_dora": (AB, {META: json.dumps(SETTINGS | {"unet.use_dora": True})}, "none of its layers has lengths", False),
    "sgm_sd1": (
        pair("lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"),
        None,
        "loads in  ComfyUI, A1111, Forge",
        True,
    ),
    "sdxl": (
        pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048, 640),
        None,
        "Stable Diffusion XL",
        True,
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_is_said_of_an_adapter(tmp_path, name):
    tensors, metadata, told, may_load = NAMED[name]
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "x.safetensors", metadata)
    facts = inspect_adapter(tmp_path / "x.safetensors")
    text = describe(facts)
    assert told in text if told[0] != "!" else not any(line.startswith(told[1:]) for line in text.splitlines())
    assert any(facts.readers.values()) == may_load, facts.readers
    assert "\x1b" not in text and all(line[9] == " " for line in text.splitlines())


ELSE = {  # a file that is no adapter -> its bytes, what it is called
    "empty": (save({}), "holds no tensors at all"),
    "zero_bytes": (b"", "is empty (0 bytes)"),
    "html": (b"<!doctype html><html>login</html>", "is a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n", "is a git-LFS pointer"),
    "huge_header": (struct.pack("<Q", 2**40) + b"{}", "a header of 1,099,511,627,776 bytes is announced"),
    "truncated": (save(K)[:-100], "cut off or damaged"),
    "cut_header": (save(K)[:60], "cut off or damaged"),
    "textual_inversion": (save({"emb_params": rand(2, 768)}), "is a textual inversion"),
    "textual_inversion_xl": (save({"clip_l": rand(2, 768), "clip_g": rand(2, 1280)}), "is a textual inversion"),
    "hypernet": (save({"320.0.linear.0.weight": rand(640, 320)}), "is a hypernetwork"),
    "control": (save({"lora_controlnet": rand(1), "input_blocks.1.1.proj_in.up": rand(3, 4)}), "is a Control-LoRA"),
    "text": (b"Invalid username or password.", 'is a text that begins "Invalid username or password."'),
    "xlabs": (
        save({"double_blocks.0.processor.qkv_lora1.down.weight": rand(16, 64)}),
        "is an adapter for FLUX.1 in the form of XLabs",
    ),
    "base": (save({"model.diffusion_model.input_blocks.0.0.weight": rand(3, 4)}), "is a base model"),
    "odd_metadata": (
        raw({"__metadata__": {"a": 1}, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        "holds what is no text (a)",
    ),
}


@pytest.mark.parametrize("name", ELSE)
def test_a_file_is_named_for_what_it_is(tmp_path, sd1, name):
    data, told = ELSE[name]
    (tmp_path / "x.safetensors").write_bytes(data)
    for look in (inspect_adapter, lambda file: load_lora(sd1.fresh(), file)):
        with pytest.raises(LoraMvpError) as caught:
            look(tmp_path / "x.safetensors")
        assert told in str(caught.value) and caught.value.code in ("adapter_unreadable", "adapter_unknown")


def test_a_pickle_is_named_and_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    torch.save({"x": Trap()}, tmp_path / "x.safetensors")
    with pytest.raises(LoraMvpError, match="is a pickle"):
        inspect_adapter(tmp_path / "x.safetensors")
    assert not (tmp_path / "sprung").exists()


def test_settings_that_are_not_true_do_not_stop_the_reader(sd1, tmp_path):
    """A header may name another rank than the matrices have; the matrices count."""
    text = {f"unet.{key}": value for key, value in {"r": 64, "lora_alpha": ALPHA, "target_modules": ["to_q"]}.items()}
    name = next(name for name in sd1.zoo.pairs if name.startswith("unet."))
    down, up = sd1.zoo.pairs[name]
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors, tmp_path / "x.safetensors", {META: json.dumps(text)})
    pipe = sd1.fresh()
    load_lora(pipe, tmp_path / "x.safetensors")
    fuse(pipe)
    sd1.zoo.deltas["one"] = {name: sd1.zoo.delta(name, ALPHA / RANK)}
    assert sd1.is_right("one", sd1.weights(pipe))


def test_the_rest_is_used_when_it_is_wanted(sd1, tmp_path, caplog):
    tensors = load_file(sd1.files["kohya"])
    odd = {"lora_unet_x.lora_down.weight": rand(2, 2), "lora_unet_y.w_norm": rand(3), "bundle_emb.w.clip_l": rand(2, 4)}
    save_file(tensors | odd, tmp_path / "odd.safetensors")
    with pytest.raises(
        LoraMvpError, match="3 of .* layers cannot be used(.|\n)*unet.x is no layer of this base(.|\n)*--partial"
    ):
        load_lora(sd1.fresh(), tmp_path / "odd.safetensors")
    pipe = sd1.fresh()
    load_lora(pipe, tmp_path / "odd.safetensors", partial=True)
    assert "unet.y is norm layers" in caplog.text
    fuse(pipe)
    assert sd1.is_right("kohya", sd1.weights(pipe))


KEYS = st.lists(
    st.sampled_from(
        "lora_unet_ lora_te_ unet. text_encoder. base_model.model. diffusion_model. transformer. down_blocks.0.attentions.0. x_ "
        "mid_block_ attn2_to_k attn1.processor.to_q .lora_down.weight .lora_up.weight .alpha .lora_A.weight .lora_B.weight .dora_scale "
        ".hada_w1_a .hada_w1_b .lokr_w1 .lokr_w2_b .lora_mid.weight .diff .w_norm .on_input .weight _lora.up.weight . \x1b \n é".split(
            " "
        )
    ),
    min_size=1,
    max_size=5,
).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=5,
)
SHAPES = st.lists(st.integers(0, 5), max_size=4)
DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F64": 8, "I64": 8, "BOOL": 1}


@st.composite
def files(draw):
    """Bytes of a file whose table is sound or nearly so."""
    table, at = {}, 0
    for key in draw(st.lists(KEYS, max_size=8, unique=True)):
        shape, dtype = draw(SHAPES), draw(st.sampled_from(list(DTYPES)))
        size = DTYPES[dtype]
        for n in shape:
            size *= n
        table[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    if draw(st.booleans()):
        names = st.sampled_from(
            [META, "ss_steps", "ss_base_model_version", "modelspec.architecture", "modelspec.trigger_phrase"]
        )
        inner = st.dictionaries(
            st.sampled_from(["unet.lora_alpha", "unet.alpha_pattern", "unet.use_rslora", "unet", ""]), VALUES
        )
        table["__metadata__"] = draw(
            st.dictionaries(names, st.text(max_size=20) | inner.map(lambda x: json.dumps(x)) | VALUES, max_size=4)
        )
    data = bytearray(raw(json.dumps(table).encode(), draw(st.binary(min_size=at, max_size=at))))
    for _ in range(draw(st.integers(0, 2))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


def look_at(folder, data):
    """Inspect bytes: facts or a refusal, and nothing else; what is shown is plain text on its own lines."""
    file = folder / "fuzz.safetensors"
    file.write_bytes(data)
    try:
        facts = inspect_adapter(file)
    except LoraMvpError as error:
        assert error.code in ("adapter_unreadable", "adapter_unknown")
        assert all(c.isprintable() for c in str(error))
        return
    text = describe(facts)
    assert all(c.isprintable() or c == "\n" for c in text) and len(text.splitlines()) <= 11 + len(facts.remarks)
    facts.model_dump_json()
    if any(facts.readers.values()):  # a claim needs the library that all programs read with to take the file
        load_file(file)


FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=60, **FUZZ)
@given(data=files())
def test_inspect_answers_whatever_it_is_given(tmp_path_factory, data):
    look_at(tmp_path_factory.getbasetemp(), data)


@pytest.mark.slow
@settings(max_examples=5000, **FUZZ)
@given(data=files() | st.binary(max_size=200).map(lambda x: raw(x)) | st.binary(max_size=50))
def test_inspect_answers_whatever_it_is_given_at_length(tmp_path_factory, data):
    look_at(tmp_path_factory.getbasetemp(), data)


def test_inspect_needs_no_torch(sd1):
    code = f"import sys; from lora_mvp.cli import main; code = main(['inspect', {str(sd1.files['loha'])!r}])\n"
    code += "print(code, sorted({'torch', 'diffusers', 'peft', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []" and "LoHa" in done.stdout


def test_a_training_begins_where_an_adapter_ended_and_is_saved_in_half(drawings, small_run, tmp_path):
    """From a file of another program, by the settings alone; what is written is certified and comes back."""
    from lora_mvp.config import load_config
    from lora_mvp.models.kohya import write_kohya
    from lora_mvp.models.miniatures import random_lora
    from lora_mvp.models.proof import differences, probe
    from lora_mvp.train.loop import train

    first = random_lora(load_base("tiny"), lora_targets="attention", text_encoder_learning_rate=None, by=0.05)
    file = write_kohya(first, tmp_path / "first.safetensors")
    keys = {"init_adapter": file, "save_dtype": "float16", "learning_rate": 1e-9, "max_train_steps": 2}
    train(load_config(overrides=small_run(tmp_path / "run", **keys)), drawings)
    written = inspect_adapter(tmp_path / "run")
    assert written.dtype == "F16" and inspect_adapter(tmp_path / "run" / "run.safetensors").dtype == "F16"
    again = load_base("tiny")
    load_lora(again, tmp_path / "run")
    wanted = probe(first)
    assert differences(wanted, probe(again))["unet"] < 0.01 * differences(wanted, probe(load_base("tiny")))["unet"]
    certificate = json.loads((tmp_path / "run" / "lora_adapter" / "certificate.json").read_text())
    assert set(certificate["forms"]) == {"diffusers", "kohya"}


def test_merged_adapters_do_what_both_did(sd1, tmp_path):
    """A LoHa and a LoRA of other trainers, half and half, judged by the formulas of both."""
    from lora_mvp.models.merging import merge_adapters

    pair = [(sd1.files["loha"], 0.5), (sd1.files["kohya"], -1.0)]
    record = merge_adapters(pair, tmp_path / "both.safetensors", base=sd1.root)
    pipe = sd1.fresh()
    load_lora(pipe, tmp_path / "both.safetensors")
    fuse(pipe)
    loha, kohya = sd1.zoo.deltas["loha"], sd1.zoo.deltas["kohya"]
    sd1.zoo.deltas["both"] = {name: 0.5 * loha.get(name, 0) - kohya.get(name, 0) for name in {*loha, *kohya}}
    assert sd1.is_right("both", sd1.weights(pipe)) and record.kept == 1.0
    assert (tmp_path / "both.certificate.json").is_file()
    small = merge_adapters(
        [(tmp_path / "both.safetensors", 1.0)], tmp_path / "small.safetensors", rank=2, base=sd1.root
    )
    assert set(small.ranks) == {2} and 0.1 < small.kept < 1
