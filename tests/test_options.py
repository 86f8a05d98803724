"""How options, the scripts' values and the recipe's make the settings, and the folder's name."""

import io
import shlex
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from scripts import ROOT, SCRIPTS, WHOLE, chosen, parse, write

import deblur
import denoise
import utils
from network import recipes
from network.device import open_device
from network.noise import white
from network.scale import find_scale


@pytest.mark.parametrize("script", ["denoise.py", "deblur.py"])
def test_help_waits_for_neither_pytorch_nor_matplotlib(script):
    blocked = "import runpy, sys; sys.modules.update(torch=None, matplotlib=None);"
    command = f"{blocked} runpy.run_path(sys.argv[1], run_name='__main__')"
    words = [sys.executable, "-c", command, script, "--help"]
    made = subprocess.run(words, capture_output=True, check=True, text=True, cwd=ROOT)
    for name in SCRIPTS[script.removesuffix(".py")].DEFAULTS:
        assert f"\n  --{name}" in made.stdout
    headings = [line for line in made.stdout.splitlines() if line.endswith(":")]
    blur = ["blur:"] * (script == "deblur.py")
    expected = ["picture:", *blur, "method:", "output:", "Examples:"]
    assert [line for line in headings if line in expected] == expected
    _, examples = made.stdout.split("Examples:\n")
    commands = [line.split("  (")[0] for line in examples.splitlines()]
    assert len(commands) == 2
    for command in commands:  # each can be read by the script itself
        _, name, *words = command.split()
        assert name == script
        parse(shlex.join(words), name.removesuffix(".py"))


@pytest.mark.parametrize("task", SCRIPTS)
def test_a_shell_script_has_no_values_of_its_own(task):
    words = shlex.split((ROOT / f"{task}.sh").read_text(), comments=True)
    script = f"$(dirname $0)/{task}.py"
    assert words == ["exec", "python", "-u", script, "$@"]


@pytest.mark.parametrize("task", SCRIPTS)
def test_every_option_has_a_default_and_the_others_a_recipe_decides(task):
    script = SCRIPTS[task]
    assert script.DEFAULTS.keys() <= utils.OPTIONS.keys()
    assert {*utils.OPTIONS["recipe"][0]} == recipes.RECIPES.keys()
    names = {field.name for field in fields(recipes.Recipe)} - {"bs"}
    for name in utils.OPTIONS.keys() & names:
        assert script.DEFAULTS[name] is None


def test_a_flag_wins_over_the_script_and_the_script_over_the_recipe(monkeypatch):
    paper, fast = (chosen(f"--sigma 5 --recipe {r}")[0] for r in ("paper", "fast"))
    named = recipes.RECIPES["paper"]
    assert paper == replace(named, photons=None, noise=paper.noise)
    differ = {
        f.name for f in fields(fast) if getattr(fast, f.name) != getattr(paper, f.name)
    }
    assert differ | {"precision", "photons"} == {f.name for f in fields(fast)} - {"bs"}
    monkeypatch.setitem(denoise.DEFAULTS, "lr", 0.25)
    assert chosen("--sigma 5")[0] == replace(fast, lr=0.25)
    flags = "--sigma 5 --lr 0.5 --iteration 7 --drop_rate 0.1"
    expected = replace(fast, lr=0.5, iteration=7, drop_rate=0.1)
    assert chosen(flags)[0] == expected


@pytest.mark.parametrize(
    ("flags", "drop_rate", "power"),
    [
        ("", 0.2, 3),
        ("--sigma 0", 0.2, 3),
        ("--sigma 39.9", 0.2, 3),
        ("--sigma 40", 0.3, 1),
        ("--sigma 5 --observed", 0.2, 3),
        ("--sigma 50 --observed", 0.2, 3),
        ("--noise_sigma 50 --observed", 0.3, 1),
        ("--recipe paper --sigma 5", 0.3, None),
    ],
)
def test_fast_goes_by_the_noise_where_it_is_known(flags, drop_rate, power):
    """Noise counts against the range that the picture fills."""
    scale = find_scale(WHOLE, np.ones((1, 1, 1)))
    y = scale.to(WHOLE)  # whose range is 1
    recipe, _ = chosen(flags, y=y)
    assert (recipe.drop_rate, recipe.averaging_power) == (drop_rate, power)
    blurred, _ = chosen(flags, "deblur", y)
    assert blurred.drop_rate == (0.2 if power else 0.3)
    if "observed" not in flags and power:
        dark = chosen(flags.replace("40", "0.4").replace("39.9", "0.399"), y=y / 100)[0]
        expected = 0.3 if flags == "" else drop_rate
        assert dark.drop_rate == expected


@pytest.mark.parametrize(
    ("flags", "width", "window"),
    [
        ("", 0.5, 256),
        ("--width 1 --window 64", 1, 64),
        ("--fuse off", 1, 384),
        ("--recipe paper", 1, 0),
        ("--sigma 0 --missing 0.5", 0.5, 256),
    ],
)
def test_less_of_a_network_will_do_where_noise_is_fused(flags, width, window):
    recipe, _ = chosen(flags)
    assert (recipe.width, recipe.window) == (width, window)


@pytest.mark.parametrize(
    ("device", "side", "width", "window"),
    [
        ("cpu", 512, 0.5, 256),
        ("cpu", 513, 0.5, 384),
        ("cuda", 512, 1, 384),
        ("mps", 512, 0.5, 256),
    ],
)
def test_how_much_is_trained_goes_by_device_and_size(device, side, width, window):
    y, given = np.tile(WHOLE, (1, 9, 9)), {"device": torch.device(device)}
    y = y[:, :side, :512]
    for margin in (0, 7):
        around = [(0, 0), (margin, margin), (margin, margin)]
        known = np.pad(np.ones((1, *y.shape[1:])), around)
        canvas = np.pad(y, around)
        recipe = recipes.adapt("fast", canvas, known, white(25), given=given)
        assert recipe.fuse == "noise"
        assert (recipe.width, recipe.window) == (width, window)


def test_fast_fuses_where_it_pays():
    def fuses(task, flags):
        return chosen(flags, task)[0].fuse != "none"

    assert fuses("denoise", "") and fuses("deblur", "")
    assert fuses("deblur", "--fuse on") and fuses("denoise", "--observed --fuse on")
    for flags in ("--sigma 0", "--drop_rate 0", "--num_prediction 1"):
        assert not fuses("denoise", flags)
        assert not fuses("deblur", flags)
    assert fuses("deblur", "--missing 0.5") and fuses("denoise", "--missing 0.5")
    assert fuses("denoise", "--missing 0.5 --sigma 0")
    assert not fuses("deblur", "--missing 0.5 --sigma 0")
    assert not fuses("denoise", "--recipe paper")


@pytest.mark.parametrize("task", SCRIPTS)
def test_white_noise_of_a_named_level_is_fused_without_photons(task):
    for flags, fuses, photons, sigma in (
        ("--noise_sigma 7", True, None, 7),
        ("--noise_sigma 7 --fuse off --real_noise", False, 100, 7),
        ("--noise_sigma 0", False, None, 0),
    ):
        recipe, noise = chosen(f"--observed {flags}", task)
        assert (recipe.fuse != "none", recipe.photons) == (fuses, photons)
        assert noise.sigma() == pytest.approx(sigma)


@pytest.mark.parametrize("able", [True, False])
def test_fast_takes_bfloat16_where_the_processor_has_it(able, monkeypatch):
    capabilities = {"avx512_bf16": able, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    for flags, precision in (
        ("", "bfloat16" if able else "float32"),
        ("--precision auto", "bfloat16" if able else "float32"),
        ("--precision float32", "float32"),
        ("--precision bfloat16", "bfloat16"),
        ("--recipe paper", "float32"),
    ):
        assert chosen(flags)[0].precision == precision
    assert not recipes.multiplies_bfloat16(torch.device("cuda"))


def test_edited_defaults_are_checked_like_flags(monkeypatch, capsys):
    monkeypatch.setitem(denoise.DEFAULTS, "sigma", 10)
    assert parse("").sigma == 10
    assert folder_of("") == "sigma10_fast"
    for name, value in (("drop_rate", 1.5), ("optimizer", "sgd")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setitem(denoise.DEFAULTS, name, value)
            parse("")
        assert f"--{name}" in capsys.readouterr().err


def folder_of(flags, task="denoise", psf=None):
    """Return the name of a results folder."""
    args = parse(flags, task)
    return utils.named_settings(
        args, SCRIPTS[task].DEFAULTS | {"device": args.device}, psf
    )[1]


@pytest.mark.parametrize("local", [None, "2"])
def test_processes_take_a_gpu_each(local, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 100)
    monkeypatch.setenv("RANK", "199")
    if local:
        monkeypatch.setenv("LOCAL_RANK", local)
    current = []
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    monkeypatch.setattr("torch.ones", lambda *_, **__: torch.zeros(1))
    assert open_device("cuda").index == int(local or 99)
    # what asks for no device must not open a context on GPU 0
    assert current == [torch.device("cuda", int(local or 99))]


def test_a_gpu_that_this_pytorch_has_no_kernels_for_is_left_alone(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", lambda _: None)
    monkeypatch.setattr("torch.ones", fail)
    assert open_device("auto") == torch.device("cpu")
    assert "no kernel image is available" in capsys.readouterr().out
    with pytest.raises(ValueError, match="can use"):
        open_device("cuda")


def test_the_device_that_wins_is_the_only_one_opened(monkeypatch):
    opened = []
    monkeypatch.setattr("scripts.open_device", opened.append)
    parse("")
    monkeypatch.setitem(denoise.DEFAULTS, "device", "cuda:7")
    parse("")
    with pytest.raises(SystemExit):  # before a device is opened
        parse("--reference clean.png")
    assert opened == ["cpu", "cpu"]


def test_a_name_that_the_terminal_cannot_show_ends_no_run(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    parse("")
    print("\u00fc.png", flush=True)
    assert shown.buffer.getvalue() == b"\\xfc.png\n"


def test_a_notebooks_output_will_do(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert parse("").sigma == denoise.DEFAULTS["sigma"]


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (
            "--num_prediction 100 --recipe paper --iteration 1",
            "sigma25_paper_iteration1",
        ),
        (
            "--optimizer adamw --seed 1 --lr 1e-3 --bs 2 --crop 32 --sigma 10",
            "sigma10_fast_crop32_lr0.001_optimizer-adamw_bs2_seed1",
        ),
        ("--recipe paper --sigma 2.5", "sigma2.5_paper"),
        ("--observed --iteration 4", "observed_fast_iteration4"),
        ("--real_noise --sigma 0", "sigma0_fast_real_noise1"),
        (
            "--observed --fuse on --noise_sigma 7 --seed 20240101",
            "observed_fast_noise_sigma7_fuse-on_seed20240101",
        ),
    ],
)
def test_names_of_results_folders(flags, name):
    assert folder_of(flags) == name


def test_a_psf_is_named_in_the_folder():
    names = []
    for number in (1, 2):
        np.save("k.npy", np.eye(2, 3) + number)
        psf, name = deblur.choose_psf(parse("--kernel k.npy", "deblur"))
        assert psf.shape == (2, 3) and psf.sum() == pytest.approx(1)
        names.append(folder_of("--kernel k.npy", "deblur", name))
    assert len(set(names)) == 2
    assert all(name.startswith("sigma10_k-") for name in names)
    _, name = deblur.choose_psf(parse("--kernel_size 9 --kernel_sigma 1.5", "deblur"))
    assert name == "gaussian9-1.5"


def test_the_picture_may_stand_without_a_flag(capsys):
    assert parse("a.png --observed").path == "a.png"
    assert parse("--observed a.png").path == "a.png"
    assert parse("").path == "camera"
    with pytest.raises(SystemExit) as stop:
        parse("a.png --path b.png")
    assert stop.value.code == 2
    assert "'a.png' and --path: one of them" in capsys.readouterr().err


def test_who_did_not_ask_for_noise_is_told_that_it_is_added(capsys):
    write("a.png")
    for flags, told in (
        ("a.png", True),
        ("a.png --observed", False),
        ("a.png --sigma 9", False),
        ("", False),
    ):
        parse(flags)
        assert ("ADDED" in capsys.readouterr().out) == told
