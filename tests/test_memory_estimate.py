"""`python -m flatstep memory`: its figures by hand, how it counts a model, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import flatstep.__main__ as command
import pytest
from flatstep.model_sizes import MAX_PARAMETERS, read_model

LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
TINY = {"w": [100, 64], "norm": [128], "scale": []}  # 6400 + 128 + 1
MODE_24 = "AdamW8bit(master_weight_bits=24)"


def write_tensors(path: Path, shapes: dict[str, Any], dtype: str = "BF16") -> Path:
    """The head of a safetensors file: to count, no more is needed."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    header |= {name: {"dtype": dtype, "shape": shape} for name, shape in shapes.items()}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def estimate(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert command.main(["memory", *map(str, arguments), "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    report["modes"] = {mode.pop("mode"): mode for mode in report["modes"]}
    return report


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        command.main(["memory", *map(str, arguments)])
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("mode", "each", "held", "peak", "smallest"),
    [
        ("AdamW, float32 parameters", 12, 84e9, 112e9, (128, 192)),
        ("mlx.optimizers.AdamW", 6, 42e9, 56e9, (64, 96)),
        ("AdamW", 10, 70e9, 84e9, (96, 128)),
        ("AdamW(master_weight_bits=24)", 11.0625, 77_437_500_000, 91_437_500_000, (128, 128)),
        ("AdamW8bit", 4.125, 28_875_000_000, 42_875_000_000, (48, 64)),
        ("AdamW8bit(stochastic_rounding=True)", 4.125, 28.875e9, 42.875e9, (48, 64)),
        ("AdamW8bit(master_weight_bits=24)", 5.1875, 36_312_500_000, 50_312_500_000, (48, 64)),
        ("AdamW8bit(master_weight_bits=32)", 6.1875, 43_312_500_000, 57_312_500_000, (64, 96)),
        ("Lion8bit(master_weight_bits=24)", 4.125, 28_875_000_000, 42_875_000_000, (48, 64)),
    ],
)
def test_seven_billion_parameters_take_what_is_worked_out_by_hand(
    capsys: pytest.CaptureFixture[str],
    mode: str,
    each: float,
    held: float,
    peak: float,
    smallest: tuple[int, int],
) -> None:
    report = estimate(capsys, "--parameters", "7e9")
    assert report["parameters"] == report["trainable"] == 7_000_000_000
    assert len(report["modes"]) == 9
    row = report["modes"][mode]
    assert (row["bytes_per_parameter"], row["held"], row["with_gradients"]) == (each, held, peak)
    assert (row["held_fits_gb"][0], row["with_gradients_fits_gb"][0]) == smallest


def test_an_average_and_the_sum_of_gradients_take_their_bytes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = estimate(capsys, "--parameters", "64e6", "--ema", "bfloat16", "--accumulate")
    assert (report["ema"], report["accumulate"]) == ("bfloat16", "float32")
    row = report["modes"][MODE_24]
    assert (row["bytes_per_parameter"], row["held"]) == (11.1875, 716_000_000)
    assert row["with_gradients"] == row["held"] + 128_000_000


def test_float32_has_no_master_weights(capsys: pytest.CaptureFixture[str]) -> None:
    rows = estimate(capsys, "--parameters", "64M", "--dtype", "float32")["modes"]
    held = {name: row["held"] for name, row in rows.items()}
    assert held == {
        "AdamW or mlx.optimizers.AdamW": 768_000_000,
        "AdamW8bit": 256_000_000 + 136_000_000,
        "Lion8bit": 256_000_000 + 68_000_000,
    }


def test_frozen_parameters_take_their_weights_alone(capsys: pytest.CaptureFixture[str]) -> None:
    report = estimate(capsys, "--parameters", "1e9", "--trainable", "64e6", "--dtype", "float16")
    frozen, row = 936_000_000 * 2, report["modes"][MODE_24]
    assert row["held"] == frozen + 332_000_000  # 64e6 times 5.1875
    assert row["with_gradients"] == row["held"] + 128_000_000
    in_float32 = report["modes"]["AdamW, float32 parameters"]
    assert in_float32["held"] == 2 * frozen + 64_000_000 * 12


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[("7B", 7e9), ("350M", 350e6), ("1.5b", 1.5e9), ("124439808", 124439808), ("1", 1)],
        *[("0.5B", 5e8), ("7e9", 7e9), ("7E+9", 7e9), ("12k", 12e3), ("1e15", 1e15), ("1.0", 1)],
    ],
)
def test_a_number_may_be_written_in_short(
    capsys: pytest.CaptureFixture[str], text: str, number: float
) -> None:
    assert estimate(capsys, "--parameters", text)["parameters"] == number


@pytest.mark.parametrize(
    "text",
    [
        *["0", "-5", "-7B", "1.5", "7e99", "7e-9", "1e16", "9999T", "nan", "inf", "", " 7", "7 B"],
        *[
            "7BB",
            "7e9B9",
            "0x10",
            "1,000",
            "1_000",
            "٣",
            "1.",
            ".5B",
            "B",
            "9" * 5000,
            "7e999999999",
        ],
    ],
)
def test_what_is_no_number_of_parameters_is_refused(
    capsys: pytest.CaptureFixture[str], text: str
) -> None:
    for option in ("--parameters=", "--trainable="):
        message = refused(capsys, option + text)
        assert f"argument {option[:-1]}: {text!r} should be a whole number from 1" in message


def test_a_tensors_small_state_stays_float32(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = estimate(capsys, "--model", write_tensors(tmp_path / "a.safetensors", TINY))
    assert report["parameters"] == 6529 and report["counted_from"] == "3 tensors"
    held = {name: row["held"] for name, row in report["modes"].items()}
    # 100 blocks of 64 with state in codes, 2 and 1 with state in float32.
    assert held[MODE_24] == 103 * (128 + 68) + 100 * 2 * 68 + 3 * 2 * 256
    assert held["AdamW8bit"] == 103 * 128 + 100 * 2 * 68 + 3 * 2 * 256
    assert held["Lion8bit(master_weight_bits=24)"] == 103 * (128 + 68) + 100 * 68 + 3 * 256
    assert held["mlx.optimizers.AdamW"] == 103 * 64 * 6
    # Of 6,400 trained parameters nobody knows which.
    report = estimate(capsys, "--model", tmp_path / "a.safetensors", "--trainable", 6400)
    assert report["modes"][MODE_24]["held"] == 6400 * 5.1875 + 129 * 2


@pytest.mark.parametrize(("size", "is_small"), [(4095, True), (4096, False)])
def test_a_tensor_is_small_below_4096_elements(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, size: int, is_small: bool
) -> None:
    path = write_tensors(tmp_path / "a.safetensors", {"w": [size]})
    held = estimate(capsys, "--model", path)["modes"]["AdamW8bit"]["held"]
    assert held == 64 * (128 + 2 * (256 if is_small else 68))


def test_an_index_counts_the_files_beside_it_or_its_total(tmp_path: Path) -> None:
    index = write_json(
        tmp_path / "model.safetensors.index.json",
        {
            "metadata": {"total_size": 2 * 6529.0},
            "weight_map": {
                "w": "model-1.safetensors",
                "norm": "b.safetensors",
                "scale": "b.safetensors",
            },
        },
    )
    for _ in range(2):  # first no file is there, then one of two
        for path in (index, tmp_path):
            model = read_model(path, 2)
            assert model.parameters == 6529 and not model.has_tensors
            assert "are missing" in model.source
        write_tensors(tmp_path / "model-1.safetensors", {"w": TINY["w"]})
    write_tensors(tmp_path / "b.safetensors", {"norm": [128], "scale": []})
    for path in (index, tmp_path):
        model = read_model(path, 2)
        assert model.sizes == {6400: 1, 128: 1, 1: 1} and model.has_tensors


def test_a_folder_is_counted_from_its_tensors_before_its_config(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", GPT2)
    assert read_model(tmp_path, 2).parameters == 124_439_808
    write_tensors(tmp_path / "model-00001-of-00002.safetensors", TINY)
    write_tensors(tmp_path / "model-00002-of-00002.safetensors", {"v": [3]})
    write_tensors(tmp_path / "adapters.safetensors", {"a": [10**9]})
    assert read_model(tmp_path, 2).parameters == 6529 + 3


def test_masks_and_frequencies_of_old_checkpoints_are_no_parameters(tmp_path: Path) -> None:
    buffers = {"h.0.attn.bias": [1, 1, 8, 8], "layers.0.self_attn.rotary_emb.inv_freq": [64]}
    path = write_tensors(tmp_path / "a.safetensors", {**buffers, "h.1.attn.bias": [64]})
    assert read_model(path, 2).parameters == 64


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        pytest.param(LLAMA, 1_235_814_400, id="Llama-3.2-1B"),
        pytest.param(MISTRAL, 7_241_732_096, id="Mistral-7B-v0.1"),
        pytest.param(MISTRAL | {"head_dim": None}, 7_241_732_096, id="head_dim null"),
        pytest.param(QWEN2, 494_032_768, id="Qwen2.5-0.5B"),
        pytest.param(QWEN3, 596_049_920, id="Qwen3-0.6B"),
        pytest.param(QWEN3 | {"attention_bias": False}, 596_049_920, id="no bias"),
        pytest.param(GPT2, 124_439_808, id="gpt2"),
        # q, o: 2048 each, k, v: 512 each; gate, up: 8192 each, down: 2048.
        pytest.param(LLAMA | {"attention_bias": True}, 1_235_814_400 + 16 * 5120, id="attention"),
        pytest.param(LLAMA | {"mlp_bias": True}, 1_235_814_400 + 16 * 18432, id="mlp"),
        pytest.param(
            LLAMA | {"tie_word_embeddings": False}, 1_235_814_400 + 128256 * 2048, id="not tied"
        ),
    ],
)
def test_a_config_counts_what_the_published_model_has(
    tmp_path: Path, config: dict[str, Any], parameters: int
) -> None:
    path = write_json(tmp_path / "config.json", config)
    for place in (path, tmp_path):
        assert read_model(place, 2).parameters == parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "one of llama, mistral, qwen2, qwen3, gpt2, and not quantized"),
        ({"model_type": ["llama"]}, "it is ['llama']"),
        ({"model_type": None}, "it is None"),
        ({"quantization": {"bits": 4}}, "not quantized"),
        ({"hidden_size": None}, "hidden_size should be a whole number from 1 to 2,147,483,647"),
        ({"hidden_size": "2048"}, "it is '2048'"),
        ({"num_hidden_layers": -1}, "it is -1"),
        ({"num_hidden_layers": True}, "it is True"),
        ({"vocab_size": 2**31}, "it is 2147483648"),
        ({"vocab_size": 1.5}, "it is 1.5"),
        ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1}, "more than 10^15 parameters"),
    ],
)
def test_a_config_that_cannot_be_counted_says_why(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write_json(tmp_path / "config.json", LLAMA | change)
    error = refused(capsys, "--model", path)
    assert message in error
    assert error.endswith("--parameters takes a number instead")


def head(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"", "announce a header of 0, and 0 follow"),
        ("a.safetensors", b"abc", "no safetensors file, or not all of one"),
        ("a.safetensors", head(b'{"w": {"dtype"', 200), "a header of 200, and 14 follow"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "not all of one"),
        ("a.safetensors", head(b'{"w": {"dtype"'), "should hold a JSON object"),
        ("a.safetensors", head(b"[1]"), "should hold a JSON object"),
        ("a.safetensors", head(b"\xff\xfe\xff\xff"), "should hold a JSON object"),
        ("a.safetensors", head(b"[" * 100_000), "should hold a JSON object"),
        ("a.safetensors", head(b"{}"), "has no parameters"),
        ("a.safetensors", head(b'{"w": 3}'), "w should be F32, F16 or BF16 of some shape"),
        ("a.safetensors", head(b'{"w": {"dtype": "U32", "shape": [8, 8]}}'), "not {'dtype': 'U32'"),
        ("a.safetensors", head(b'{"w": {"dtype": "F32", "shape": [8, -8]}}'), "w should be"),
        ("a.safetensors", head(b'{"w": {"dtype": "F32", "shape": "88"}}'), "w should be"),
        ("a.safetensors", head(b'{"w": {"dtype": "F32", "shape": [1e3]}}'), "w should be"),
        ("a.safetensors", head(b'{"w": {"dtype": "F32", "shape": [true]}}'), "w should be"),
        ("a.safetensors", head(b'{"w": {"dtype": "F32", "shape": [0]}}'), "has no parameters"),
        (
            "a.safetensors",
            head(b'{"w": {"dtype": "F32", "shape": [%s]}}' % (b"9" * 4000)),
            "has more than 10^15 parameters",
        ),
        ("a.json", b"", "should hold a JSON object"),
        ("a.json", b"{}", "model_type should be one of llama"),
        ("a.json", b'{"weight_map": 3}', "weight_map and metadata should be JSON objects"),
        ("a.json", b'{"weight_map": {}, "metadata": 3}', "weight_map and metadata should be"),
        ("a.json", b'{"weight_map": {}}', "total_size should be a whole number"),
        ("a.json", b'{"weight_map": {"w": ["x"]}}', "total_size should be a whole number"),
        ("a.json", b'{"weight_map": {}, "metadata": {"total_size": -4}}', "it is -4"),
        ("a.json", b'{"weight_map": {}, "metadata": {"total_size": NaN}}', "it is nan"),
        ("a.json", b'{"weight_map": {}, "metadata": {"total_size": 1}}', "has no parameters"),
        ("weights.npz", b"PK", "should be a file of the kind model.safetensors.index.json"),
    ],
)
def test_a_file_that_is_no_model_says_why(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    error = refused(capsys, "--model", tmp_path / name)
    assert message in error
    assert len(error) < 500


def test_what_is_not_there_or_contradicts_itself_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "folder.safetensors", tmp_path / "model.safetensors"):
        assert f"--model {path}: should be a file" in refused(capsys, "--model", path)
    for path in (tmp_path / "none.safetensors", Path("mlx-community/a-model"), tmp_path / "none"):
        assert f"--model {path}: No such file" in refused(capsys, "--model", path)
    assert "not allowed with" in refused(capsys, "--model", "a", "--parameters", 1)
    assert "--parameters --model is required" in refused(capsys)
    error = refused(capsys, "--parameters", "1M", "--trainable", "2M")
    assert error.endswith("--trainable 2,000,000: the model has 1,000,000 parameters")
    assert "invalid choice: 'int8'" in refused(capsys, "--parameters", 1, "--dtype", "int8")


def test_the_table_fits_in_80_columns() -> None:
    for arguments in (["7e9"], ["1"], [str(MAX_PARAMETERS)], ["1e15", "--dtype", "float32"]):
        process = subprocess.run(
            [sys.executable, "-m", "flatstep", "memory", "--parameters", *arguments],
            capture_output=True,
            encoding="utf-8",
        )
        assert process.returncode == 0 and process.stderr == ""
        lines = process.stdout.splitlines()
        assert max(map(len, lines)) <= 80
        if arguments == ["7e9"]:
            (row,) = [line.split() for line in lines if line.startswith(f"  {MODE_24} ")]
            assert row == [MODE_24, "5.1875", "36.3", "48", "50.3", "64"]
        assert (">512" in process.stdout) == (arguments[0] not in ("7e9", "1"))
