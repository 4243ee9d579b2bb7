"""Sweeps: a planted best arm is found, equal arms are not told apart, and a sweep that is killed goes on."""

import os
import random
import signal
from collections import Counter

import numpy as np
import pytest
import yaml
from live_service import end_jobs, serving, settings
from trainings import command, training_server, wait_for

from lora_mvp.cli import main
from lora_mvp.data.manifest import read_manifest
from lora_mvp.errors import LoraMvpError
from lora_mvp.eval.arms import settle_arms, standings, with_confirmation
from lora_mvp.eval.extractors import ExtractorRecord, Preprocess
from lora_mvp.eval.metrics import alignment
from lora_mvp.eval.rule import Candidate
from lora_mvp.eval.scores import Side, Terms, prompt_scores, sample_scores, score_sides, wrong_match
from lora_mvp.eval.verdicts import confirms
from lora_mvp.files import read_record
from lora_mvp.infer import find_run
from lora_mvp.sweep import Sweep, planned_sweep, train_arms
from lora_mvp.sweep_file import arm_configs, read_sweep

D = 24  # width of the features


class Eyes:
    """Stands for an extractor: it has a name, and the features are given."""

    name, frechet_name, dim, meaningful = "made", "fd_made", D, True
    record = ExtractorRecord(
        name="made", source="", weights_sha256="", dim=D, preprocess=Preprocess(edge=1, size=(1, 1))
    )

    def too_long(self, prompts):
        return []


class Pictures:
    """What several trainings drew: points for 24 things, in the base's style or nearer to the one that is asked for."""

    def __init__(self, rng, prompts=24):
        self.rng, self.things, self.styles = rng, rng.normal(size=(prompts, D)), rng.normal(size=(2, D))
        self.prompts, self.real = [f"{k}" for k in range(prompts)], self.draw(rng.normal(size=(24, D)), 1)
        self.luck = {}  # what suits an arm by chance, prompt by prompt; fresh seeds do not change it

    def draw(self, things, style):
        look = (1 - style) * self.styles[0] + style * self.styles[1]
        return things + look + 0.6 * self.rng.normal(size=things.shape)

    def sides(self, styles):
        found = {}
        for name, style in styles.items():
            luck = self.luck.setdefault(name, 0.4 * self.rng.normal(size=self.things.shape))
            points = luck + self.draw(self.things, style)
            values = sample_scores(alignment(points, self.things), points)
            wrong = wrong_match(points, self.things, self.prompts)
            found[name] = Side(name, [], points, values, prompt_scores(points, self.real, self.prompts), wrong)
        return found

    def judge(self, a, b):
        return score_sides(a, b, self.prompts, self.real, (Eyes(), Eyes()), terms=Terms("style")).judgement


def simulated(seed, planted=None, arms=9):
    """The settlement of one sweep and where its arms stand; `planted`: the place of the arm that is nearer to the style asked for."""
    rng, names = np.random.default_rng([17, seed]), [f"arm {k}" for k in range(arms)]
    styles = {name: 0.5 if k == planted else 0.3 for k, name in enumerate(names)}
    first, *rest = names
    pictures = Pictures(rng)
    sides = pictures.sides(styles)
    others = standings({name: pictures.judge(sides[first], sides[name]) for name in rest})
    candidates = {name: Candidate(k, {"gap": -sides[name].of_prompts["gap"]}) for k, name in enumerate(names, 1)}
    found = settle_arms(candidates, others)
    if found.verdict != "better":
        return found, others
    fresh = pictures.sides({name: styles[name] for name in (first, found.best)})  # the same prompts, other luck
    again = confirms(pictures.judge(fresh[first], fresh[found.best]), found.best)
    return with_confirmation(found, names, *again), others


@pytest.mark.parametrize("repeats", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_a_planted_best_arm_is_found(repeats):
    right = 0
    for k in range(repeats):
        planted = k % 9
        found, _ = simulated(k, planted)
        right += (found.verdict, found.best) == ("better" if planted else "first_best", f"arm {planted}")
    print(f"{right} of {repeats}")
    assert right >= 0.9 * repeats


@pytest.mark.parametrize("repeats", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_equal_arms_are_not_told_apart(repeats):
    pairs = [simulated(1000 + k) for k in range(repeats)]
    found, said = [s for s, _ in pairs], Counter(s.verdict for s, _ in pairs)
    alone = sum(any(s.judgement.verdict != "no_evidence" for s in others.values()) for _, others in pairs)
    print(said, "one at a time:", alone)
    assert alone >= 0.1 * repeats, "these pictures tempt nobody"
    assert said["no_evidence"] >= 0.95 * repeats
    assert all(s.best == "arm 0" and "as good as any" in s.why for s in found if s.verdict == "no_evidence")


PROMPTS = ["disc", "a disc", "disc, number 1", "disc, number 2", "square", "a square", "square, number 1", "square, 2"]


@pytest.fixture
def files(drawings, small_run, tmp_path):
    """A configuration of seconds, a sweep of two arms, and the command for them."""
    keys = small_run(tmp_path / "unused", max_train_steps=4, sample_every=0, sample_prompts=[], checkpointing_steps=1)
    keys |= {"evaluation.num_inference_steps": 1, "evaluation.num_samples": 1, "evaluation.guidance_scale": 1}
    keys |= {"evaluation.prompts": PROMPTS, "evaluation.fid_batch_size": 8}
    config = {}
    for key, value in keys.items():
        section, name = key.split(".")
        config.setdefault(section, {})[name] = str(value) if name == "output_dir" else value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "sweep.yaml").write_text("values:\n  training.lora_rank: [4, 2]\n")
    where = ["--config", str(tmp_path / "config.yaml"), "--manifest", str(drawings), "--out", str(tmp_path / "out")]
    return tmp_path, ["sweep", str(tmp_path / "sweep.yaml"), *where]


SERVER = training_server()


def killed_when(condition, root, words):
    """Start a sweep in a process of its own, and kill it there."""
    process = SERVER.Process(target=command, args=(words, str(root / "log")))
    process.start()
    assert wait_for(condition, process, 120), (root / "log").read_text()
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_sweep_that_is_killed_goes_on_to_its_page_and_its_adapter(files, capsys):
    root, words = files
    arms = root / "out" / "arms"
    killed_when((arms / "lora_rank-4" / "checkpoint-2").is_dir, root, words)
    kept = (arms / "lora_rank-2" / "run.json").read_bytes()  # the cheaper one was first, and is finished
    assert not (arms / "lora_rank-4" / "run.json").exists()

    (root / "sweep.yaml").write_text("values:\n  training.lora_rank: [2, 4]\n  training.seed: [1]\n")
    assert main(words) == 2
    assert "the arm lora_rank-4 is gone" in capsys.readouterr().err
    (root / "sweep.yaml").write_text("values:\n  training.lora_rank: [2, 4]\n")  # the same arms in another order
    assert main([*words, "--set", "evaluation.goal=style"]) == 2
    assert "evaluation.goal was both, is now style" in capsys.readouterr().err

    samples = root / "out" / "evaluation" / "samples"
    killed_when(lambda: any(samples.glob("arm-lora_rank-2/*/*.png")), root, words)
    drawn = {file: file.stat().st_mtime_ns for file in samples.glob("*/*/*.png")}
    assert read_record(Sweep, root / "out" / "sweep.json").result is None

    assert main(words) == 0
    said = capsys.readouterr().out
    again = [file for file, when in drawn.items() if file.stat().st_mtime_ns != when]
    assert len(drawn) > 24 and len(again) <= 1, "only the picture that was being written is drawn again"
    assert (arms / "lora_rank-2" / "run.json").read_bytes() == kept
    found = read_record(Sweep, root / "out" / "sweep.json")
    result = found.result
    assert [arm.name for arm in found.arms] == ["lora_rank-2", "lora_rank-4"] == [s.name for s in result.scores]
    assert result.why in said and result.n_prompts == len(PROMPTS)
    assert all(s.scores["clip_score"].low < s.scores["clip_score"].high for s in result.scores)
    page = (root / "out" / "sweep.html").read_text()
    assert "lora_rank-4" in page and "data:image/png" in page
    adapter = "pytorch_lora_weights.safetensors"
    trained = (arms / result.best / "lora_adapter" / adapter).read_bytes()
    assert (root / "out" / "best" / adapter).read_bytes() == trained
    assert find_run(root / "out" / "best")[0] == "tiny"

    assert main(words) == 0 and result.why in capsys.readouterr().out, "a finished sweep says again what it found"


def test_arms_are_trained_by_a_service_and_judged_here(files, drawings, small_run, capsys):
    """A real server; the sweep is killed while its jobs run, and takes the same jobs up again."""
    root, words = files
    own = {"lora_rank": 16, "text_encoder_learning_rate": 1e-4}  # of the service, which no arm has
    server = settings(root, drawings.parent.parent, own, max_workers=2)
    try:
        with serving(server) as (_, url):
            there = [*words, "--url", url, "--data", f"{drawings.parent.name}/manifest.json"]
            record = root / "out" / "sweep.json"
            killed_when(lambda: record.exists() and record.read_text().count('"job": "') == 2, root, there)
            jobs = [arm.job for arm in read_record(Sweep, record).arms]
            assert main(there) == 0, capsys.readouterr().err
    finally:
        end_jobs(root / "jobs")
    found = read_record(Sweep, record)
    assert [arm.job for arm in found.arms] == jobs and len({*jobs}) == 2 == len([*(root / "jobs").glob("*/run")])
    assert found.result.why in capsys.readouterr().out and (root / "out" / "best").is_dir()
    assert main([*words[:-1], str(root / "here")]) == 0
    here = read_record(Sweep, root / "here" / "sweep.json")
    assert found.result == here.result, "what is trained there is what is trained here"


@pytest.mark.slow
def test_nine_arms_on_three_nodes(files, drawings, capsys):
    """The nodes of a Ray cluster train the arms, which are judged here."""
    pytest.importorskip("ray")
    from ray_cluster import RayCluster

    root, words = files
    text = "values:\n  training.lora_rank: [2, 4, 8]\n  training.learning_rate: [0.0001, 0.0002, 0.0004]\n"
    (root / "sweep.yaml").write_text(text)
    more = [f"{thing} {k}" for thing in ("disc", "square", "a disc", "a square") for k in range(4)]
    words += ["--set", f"evaluation.prompts={[*PROMPTS, *more]}"]
    cluster = RayCluster()
    try:
        for name in ("one", "two", "three"):
            cluster.add(name, "--num-cpus", "1")
        cluster.up()
        ray = {"engine": "ray", "ray_address": cluster.address, "max_workers": 3}
        with serving(settings(root, drawings.parent.parent, {}, **ray)) as (_, url):
            assert main([*words, "--url", url, "--data", f"{drawings.parent.name}/manifest.json"]) == 0, (
                capsys.readouterr()
            )
    finally:
        end_jobs(root / "jobs")
        cluster.close()
    found = read_record(Sweep, root / "out" / "sweep.json")
    assert len({arm.job for arm in found.arms}) == 9 == len(found.result.scores) and not any(
        a.failed for a in found.arms
    )
    print(found.result.why)


@pytest.mark.slow
def test_a_sweep_that_is_killed_again_and_again_finds_the_same(files):
    root, words = files
    rng, kills = random.Random(4), 0
    assert main([*words[:-1], str(root / "left alone")]) == 0
    for _ in range(60):
        process = SERVER.Process(target=command, args=(words, str(root / "log")))
        process.start()
        process.join(0.5 + 6 * rng.random() if kills < 25 else 120)
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    print(f"{kills} kills")
    assert process.exitcode == 0 and kills > 3, (root / "log").read_text()
    for name in ("sweep.json", "best/pytorch_lora_weights.safetensors"):
        assert (root / "out" / name).read_bytes() == (root / "left alone" / name).read_bytes(), name
    left = {path.name for path in (root / "out").iterdir() if not path.name.startswith(".sweep")}
    assert left == {"lock", "arms", "evaluation", "sweep.json", "sweep.html", "best"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("values:\n  training.lora_rank: [4]\n", "one arm only"),
        ("arms: []\n", "0 arms"),
        ("values:\n  training.lora_rank: [4, 4]\n", "two arms are called lora_rank-4"),
        ("arms:\n- name: a\n- name: b\n  training.lora_rank: 4\n", "b: trains the same as a"),
        ("values:\n  training.lora_rnak: [4, 8]\n", "did you mean lora_rank"),
        ("values:\n  training.learning_rate: [0.001, -1]\n", "training.learning_rate: -1 is not allowed"),
        ("values:\n  training.lora_targets: [attention, nothing_is_called_so]\n", "nothing_is_called_so: "),
        ("values:\n  evaluation.seed: [1, 2]\n", "must be the same for all arms"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_arm(files, text, said, capsys, monkeypatch):
    root, words = files
    monkeypatch.setattr("lora_mvp.sweep.train", None)  # nothing may be trained
    (root / "sweep.yaml").write_text(text)
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert not (root / "out" / "sweep.json").exists()


def test_an_arm_that_is_clearly_behind_is_stopped(files, drawings, capsys):
    """Real trainings: the second arm's rate ruins it. Six validation pictures are asked for, since there must be intervals."""
    root, words = files
    assert main([*words, "--stop-behind"]) == 2
    assert "needs six validation pictures for an interval, and the manifest has 2" in capsys.readouterr().err
    raw, data = drawings.parent.parent / "raw", root / "half"
    half = ["--set", f"data.raw_data_dir={raw}", "--set", f"data.processed_dir={data}", "--set", "data.train_ratio=0.5"]
    assert main(["prepare-data", *words[2:4], *half]) == 0
    (root / "sweep.yaml").write_text(
        "arms:\n- {name: first, training.lora_rank: 2}\n- {name: wild, training.learning_rate: 0.3}\n"
    )
    words[words.index("--manifest") + 1] = str(data)
    more = ["--set", "training.max_train_steps=8", "--set", "training.validate_every=2"]
    assert main([*words, *more, "--stop-behind"]) == 0
    found = read_record(Sweep, root / "out" / "sweep.json")
    first, wild = found.arms
    assert first.failed is None and wild.failed.startswith("stopped at step ") and "that of first by" in wild.failed
    assert 4 <= int(wild.failed.split()[3].rstrip(":")) < 8, "not before half of its steps, and not at its end"
    assert found.result.best == "first" and wild.failed in capsys.readouterr().out
    assert main([*words, *more]) == 2
    assert "evaluation.stop_behind was True, is now None" in capsys.readouterr().err
    assert main([*words, *more, "--stop-behind", "--url", "http://127.0.0.1:9"]) == 2
    assert "jobs run to their end" in capsys.readouterr().err


def test_prompts_that_cannot_tell_and_a_folder_in_use_are_refused_too(files, capsys):
    root, words = files
    assert main([*words, "--set", 'evaluation.prompts=["disc", "square"]']) == 2
    assert "2 prompts cannot tell 2 arms apart" in capsys.readouterr().err
    (root / "out" / "mine.txt").write_text("")
    assert main(words) == 2
    assert "is not empty and holds no sweep" in capsys.readouterr().err


def test_an_arm_that_diverges_is_marked_and_the_others_go_on(files, drawings, monkeypatch):
    root, words = files
    (root / "out").mkdir()
    configs = arm_configs(read_sweep(root / "sweep.yaml"), root / "config.yaml", [], root / "out")
    record, done = planned_sweep(configs, read_manifest(drawings), None), []

    def stand_in(code, which):
        def train(config, *_, **__):
            done.append(config.training.lora_rank)
            if config.training.lora_rank in which:
                raise LoraMvpError(code, "the loss of step 3 is nan.")

        return train

    monkeypatch.setattr("lora_mvp.sweep.train", stand_in("loss_not_finite", {2}))
    train_arms(record, configs, drawings, root / "out")
    kept = read_record(Sweep, root / "out" / "sweep.json")
    assert done == [2, 4] and [arm.failed for arm in kept.arms] == ["the loss of step 3 is nan.", None]
    train_arms(kept, configs, drawings, root / "out")
    assert done == [2, 4, 4], "what diverged once diverges again"
    for code, says in (("interrupted", "The same command goes on"), ("out_of_memory", "step 3")):
        monkeypatch.setattr("lora_mvp.sweep.train", stand_in(code, {4}))
        with pytest.raises(LoraMvpError, match=says):
            train_arms(kept, configs, drawings, root / "out")
    monkeypatch.setattr("lora_mvp.sweep.train", stand_in("loss_not_finite", {4}))
    with pytest.raises(LoraMvpError, match="no arm could be trained to its end; the first: the loss"):
        train_arms(kept, configs, drawings, root / "out")
