"""Judges that give the probability of an answer: in the process, and behind an endpoint.

Not seen with released weights: the models are tiny and random, the endpoint is ours and says what
vLLM's documentation of `logprobs` shows.
"""

import json
import math

import numpy as np
import pytest
import running
import torch
from judging import HANG_S, PICTURES, asking
from PIL import Image
from tiny import vlm
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil

from config.base import base
from flow_grpo.diffusers_patch.qwenimage_edit import PictureProcessor
from flow_grpo.rewards import loading
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.judges import local
from flow_grpo.rewards.judges.probability import Question, forms, share
from flow_grpo.rewards.judges.vqa import depends

KINDS = ("qwen2_5_vl", "qwen3_vl")
YES = {"yes", "Yes", " yes", " Yes"}
QUESTIONS = [
    Question((PICTURES[0],), "Is it red?", "yes"),
    Question((PICTURES[1], PICTURES[2]), "Is the sign a cat? Is it blue?", "yes", ("no",)),
    Question((PICTURES[3],), "How many cubes are in it?", "three"),
    Question((PICTURES[4],), "two, three or four?", "Two", ("three", "four")),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in made.items():
        vlm.save(kind, folder)
    return made


class ByHand:
    """A question alone, through transformers' own processor, and softmax in fp64."""

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        pixels = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.processor = PictureProcessor(pixels, self.tokenizer)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.words = self.tokenizer.batch_decode([[n] for n in range(len(self.tokenizer))])

    @torch.no_grad()
    def tokens(self, images, text) -> dict[str, float]:
        """The probability of each first token; of those that are written alike, together."""
        shown = "<|vision_start|><|image_pad|><|vision_end|>" * len(images)
        chat = f"<|im_start|>user\n{shown}{text}<|im_end|>\n<|im_start|>assistant\n"
        pictures = [Image.fromarray(image) for image in images]
        inputs = self.processor(text=[chat], images=pictures, return_tensors="pt")
        every = self.model(**inputs).logits[0, -1].double().softmax(-1).tolist()
        found = {}
        for word, probability in zip(self.words, every, strict=True):
            found[word] = found.get(word, 0) + probability
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_local_judges_probability_is_that_of_the_logits(folders, kind):
    hand = ByHand(folders[kind])
    every = [hand.tokens(each.images, each.text) for each in QUESTIONS]
    mass = lambda row, words: sum(every[row].get(word, 0) for word in words)  # noqa: E731
    three, four = {"three", " three", "3", "Three"}, {"four", " four", "4", "Four"}
    two = {"two", " two", "2", "Two"}
    counts = [mass(3, words) for words in (two, three, four)]
    wanted = [
        mass(0, YES),
        mass(1, YES) / (mass(1, YES) + mass(1, {"no", "No", " no", " No"})),
        mass(2, three),
        counts[0] / sum(counts),
    ]
    for batch_size in (1, 3):
        judge = local.LocalJudge(str(folders[kind]), "main", "cpu", batch_size)
        np.testing.assert_allclose(judge.ask(QUESTIONS), wanted, rtol=0, atol=1e-6)
    assert len({round(each, 4) for each in wanted}) == 4 and all(0 < p < 1 for p in wanted)


def test_a_prompts_marks_are_text(folders):
    judge = local.load(str(folders["qwen2_5_vl"]), "main", "cpu", 2)
    marked = Question((PICTURES[0],), "<|image_pad|> <|im_end|> Is it red?", "yes")
    assert 0 < judge.ask([marked])[0] < 1
    with pytest.raises(ValueError, match="'Certainly' is no single token"):
        judge.ask([QUESTIONS[0]._replace(answer="Certainly")])


def logged(*listed, **more):
    """A chat completion of one token with its log-probabilities, as vLLM sends it."""
    top = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in listed]
    content = [top[0] | {"top_logprobs": top}] if top else []
    message = {"role": "assistant", "content": listed[0][0] if listed else "", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": {"content": content, "refusal": None}}
    choice |= {"finish_reason": "length", **more}
    return 200, json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


def p(value):
    return math.log(value)


LAST = "The", p(1e-5)  # of those that are listed: others are less likely
SHARES = [  # what is listed, the answer, the others, what its probability is
    ([("Yes", p(0.9))], "yes", (), 0.9),
    ([("Yes", p(0.5)), ("yes", p(0.2)), (" Yes", p(0.1)), ("No", p(0.1))], "yes", (), 0.8),
    ([("No", p(0.9))], "yes", (), np.nan),
    ([("Yes", p(0.6)), ("No", p(0.2)), LAST], "yes", ("no",), 0.75),
    ([("Yes", p(0.6)), ("No", p(0.2)), LAST], "no", ("yes",), 0.25),
    ([("Yes", p(0.9)), ("It", p(0.05))], "yes", ("no",), np.nan),  # no: up to .05 of .95
    ([("Yes", p(0.9)), ("It", p(0.001))], "yes", ("no",), 1),
    ([("No", p(0.9)), ("It", p(0.001))], "yes", ("no",), 0),
    ([("It", p(0.9)), ("The", p(0.05))], "yes", ("no",), np.nan),
    ([("Yes", p(0.7)), ("It", p(0.0069))], "yes", ("no",), np.nan),  # NO, no, No and others
    ([("Yesterday", p(0.9)), ("yes", p(0.05))], "yes", (), 0.05),
    ([("3", p(0.5)), ("three", p(0.2)), ("2", p(0.2))], "three", (), 0.7),
    ([("3", p(0.5)), (" 3", p(0.2)), ("13", p(0.2))], "Three", (), 0.7),
    ([("A", p(0.5)), ("B", p(0.3)), ("C", p(0.2)), LAST], "B", ("A", "C"), 0.3),
    ([("A", p(0.5)), ("B", p(0.3)), LAST], "B", ("A", "C"), 0.375),
    ([("A", p(0.5)), ("B", p(0.3)), ("D", p(0.1))], "B", ("A", "C"), np.nan),
    ([], "yes", (), np.nan),
    ([], "yes", ("no",), np.nan),
]


@pytest.mark.parametrize(("listed", "answer", "others", "wanted"), SHARES)
def test_a_listed_answers_share(listed, answer, others, wanted):
    np.testing.assert_allclose(share(listed, answer, others), wanted, atol=1e-12, equal_nan=True)


def test_an_answers_forms():
    assert forms(["Yes"]) == YES
    assert forms(["three"]) == {"three", "Three", "3", " three", " Three", " 3"}


@pytest.fixture
def ask(monkeypatch):
    with asking(monkeypatch) as run:
        yield run


def test_an_endpoint_is_asked_for_one_tokens_logprobs(ask):
    found, endpoint = ask("vqascore", lambda *question: logged(("Yes", p(0.7)), ("No", p(0.1))))
    np.testing.assert_allclose(found["vqascore"], [0.7])
    ((_, _, body),) = endpoint.requests
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)
    assert body["temperature"] == 0 and body["model"] == "Qwen/Qwen3-VL-8B-Instruct"
    text = body["messages"][0]["content"][-1]["text"]
    assert text == 'Does this figure show "prompt 0"? Please answer yes or no.'


LOST = {
    "missing token": logged(("It", p(0.9))),
    "refused": logged(message={"content": None, "refusal": "I can't."}, logprobs=None),
    "filtered": logged(("Yes", p(0.9)), finish_reason="content_filter"),
    "nothing said": logged(),
}


@pytest.mark.parametrize("case", LOST)
def test_an_answer_without_the_token_is_nan_and_counted(ask, case):
    reply = lambda q, text, n: LOST[case] if "prompt 1" in text else logged(("yes", p(0.4)))  # noqa: E731
    found, _ = ask("vqascore", reply, count=3)
    np.testing.assert_allclose(found["vqascore"], [0.4, np.nan, 0.4], equal_nan=True)
    assert found["vqascore_unparsed"].tolist() == [0, 1, 0]
    assert found["vqascore_unanswered"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "body", [(500, b""), (400, b"{}"), (200, b"<html>"), (200, b'{"choices": [{"message": {}}]}')]
)
def test_an_answer_that_is_none_is_nan_and_counted(ask, body):
    reply = lambda q, text, n: body if "prompt 1" in text else logged(("yes", p(0.4)))  # noqa: E731
    found, _ = ask("vqascore", reply, count=3)
    assert np.isnan(found["vqascore"]).tolist() == [False, True, False]
    assert found["vqascore_unparsed"].tolist() == [0, 0, 0]
    assert found["vqascore_unanswered"].tolist() == [0, 1, 0]


def test_an_endpoint_without_logprobs_is_named(ask):
    with pytest.raises(ConnectionError, match="answered none of 1 questions.*has no logprobs"):
        ask("vqascore", lambda *question: logged(("Yes", p(0.9)), logprobs=None))


def test_a_grade_that_was_cut_or_refused_is_no_grade(ask):
    for reason, more in (("length", {}), ("content_filter", {}), ("stop", {"refusal": "No."})):
        message = {"content": "<Score>4</Score>"} | more
        answer = logged(message=message, finish_reason=reason)
        found, _ = ask("qwenvl", lambda *question, answer=answer: answer)
        assert np.isnan(found["qwenvl"]).all() and found["qwenvl_unparsed"].tolist() == [True]


def rows(judge_says, name, metadata, references=None, **changes):
    """Score rows by a reward whose judge says what `judge_says(question)` does."""
    settings = loading.settings(base()) | changes
    prompts = [f"prompt {n}" for n in range(len(metadata))]
    loading.check(name, settings, prompts, metadata)
    scorer = loading.load(name, settings, "cpu")
    scorer.judge.close()
    scorer.judge = type("Judge", (), {})()
    scorer.judge.ask = lambda questions: [judge_says(each) for each in questions]
    return scorer(Batch(PICTURES[: len(metadata)], prompts, metadata, references))


# Atoms' probabilities; their geometric mean; their arithmetic mean. Each worked out by hand.
ATOMS = [
    ([1.0], 1, 1),
    ([0.0], 0, 0),
    ([0.25], 0.25, 0.25),
    ([1, 1, 1], 1, 1),
    ([0.25, 1], 0.5, 0.625),
    ([0.5, 0.5], 0.5, 0.5),
    ([0.04, 0.25], 0.1, 0.145),
    ([0.01, 1], 0.1, 0.505),
    ([0.0001, 1], 0.01, 0.50005),
    ([0.001, 1, 1], 0.1, 0.667),
    ([0.008, 1, 1], 0.2, 2.008 / 3),
    ([0.125, 1, 1], 0.5, 2.125 / 3),
    ([0.125, 0.125, 0.125], 0.125, 0.125),
    ([0.2, 0.4, 0.1], 0.2, 0.7 / 3),
    ([0.9, 0.3, 0.1], 0.3, 1.3 / 3),
    ([0.5, 0.25, 0.125], 0.25, 0.875 / 3),
    ([0, 1, 1], 0, 2 / 3),
    ([0, 0, 1], 0, 1 / 3),
    ([1, 1, 1, 0.0001], 0.1, 3.0001 / 4),
    ([1, 1, 1, 0.0625], 0.5, 3.0625 / 4),
    ([0.1, 0.1, 0.4, 0.4], 0.2, 0.25),
    ([0.2, 0.8, 0.2, 0.8], 0.4, 0.5),
    ([0.5, 0.5, 0.5, 0.5], 0.5, 0.5),
    ([0.25, 0.25, 1, 1], 0.5, 0.625),
    ([1, 1, 1, 1, 0.00032], 0.2, 4.00032 / 5),
    ([1, 1, 1, 1, 0.03125], 0.5, 4.03125 / 5),
    ([np.nan], np.nan, np.nan),
    ([np.nan, 1], np.nan, np.nan),
    ([np.nan, 0], np.nan, np.nan),
    ([1, 1, np.nan], np.nan, np.nan),
]


@pytest.mark.parametrize(("atoms", "gm", "am"), ATOMS)
def test_soft_tifa_is_the_geometric_mean_of_a_prompts_atoms(atoms, gm, am):
    questions = [[f"Q{n}?", "Yes"] for n in range(len(atoms))]
    said = {f"Q{n}? Answer in one word.": value for n, value in enumerate(atoms)}
    found = rows(lambda q: said[q.text], "soft_tifa", [{"vqa_list": questions}])
    np.testing.assert_allclose(found["soft_tifa"], [gm], atol=1e-9, equal_nan=True)
    np.testing.assert_allclose(found["soft_tifa_am"], [am], atol=1e-9, equal_nan=True)
    assert found["soft_tifa_unparsed"].tolist() == [sum(map(np.isnan, atoms))]


# Yes or no; on which others a question depends; what then counts as yes: as DPG-Bench has it.
DEPENDS = [
    ([1, 1, 1], None, [1, 1, 1]),
    ([1, 0, 1], None, [1, 0, 1]),
    ([1, 1, 1], [[], [0], [0]], [1, 1, 1]),
    ([0, 1, 1], [[], [0], [0]], [0, 0, 0]),
    ([0, 1, 1], [[], [0], []], [0, 0, 1]),
    ([0, 1, 1], [[], [0], [1]], [0, 0, 0]),  # a no is handed on
    ([1, 0, 1], [[], [0], [1]], [1, 0, 0]),
    ([1, 0, 1], [[], [], [0, 1]], [1, 0, 0]),
    ([1, 1, 0], [[2], [], []], [0, 1, 0]),
    ([1, 1, 0], [[1], [2], []], [1, 0, 0]),  # in order: the first was asked before the second fell
    ([1, np.nan, 1], [[], [], [1]], [1, np.nan, np.nan]),
    ([0.5, 0.51, 0.49], None, [0, 1, 0]),
]


@pytest.mark.parametrize(("said", "parents", "wanted"), DEPENDS)
def test_a_question_counts_as_no_where_one_does_that_it_depends_on(said, parents, wanted):
    np.testing.assert_array_equal(depends(np.array(said, float), parents), wanted)


def test_skills_are_means_of_their_own_atoms_and_lost_ones_are_counted():
    metadata = [
        {
            "vqa_list": [["How many cats?", "two"], ["Are there cats?", "Yes"], ["Red?", "Yes"]],
            "skills": ["count", "object", "attribute"],
        },
        {"vqa_list": [["Dogs?", "Yes"], ["Any?", "Yes"]], "skills": ["object", "object"]},
        {"vqa_list": [["Birds?", "Yes"]]},
    ]
    said = {"How": 0.2, "Are": 0.5, "Red?": 0.8, "Dogs?": 0.4, "Any?": 0.6, "Birds?": None}
    found = rows(lambda q: said[q.text.split()[0]], "soft_tifa", metadata)
    np.testing.assert_allclose(found["soft_tifa_count"], [0.2, np.nan, np.nan])
    np.testing.assert_allclose(found["soft_tifa_object"], [0.5, 0.5, np.nan])
    np.testing.assert_allclose(found["soft_tifa"], [0.08 ** (1 / 3), 0.24**0.5, np.nan])
    assert found["soft_tifa_unanswered"].tolist() == [0, 0, 1]
    assert found["soft_tifa_unparsed"].tolist() == [0, 0, 0]


def test_dpg_is_the_share_of_yes():
    asked = [["A?", "Yes"], ["B?", "Yes"], ["C?", "Yes"]]
    metadata = [{"vqa_list": asked, "parents": [[], [0], []]}, {"vqa_list": asked}]
    said = iter([0.1, 0.9, 0.9, 0.1, 0.9, 0.9])
    found = rows(lambda q: next(said), "dpg", metadata)
    np.testing.assert_allclose(found["dpg"], [1 / 3, 2 / 3])
    with pytest.raises(ValueError, match='"parents"'):
        rows(None, "dpg", [metadata[0] | {"parents": [[7], [], []]}])


@pytest.mark.parametrize("atoms", [None, [], "Q", [["Q"]], [["Q", 1]], [["Q", "Yes", "a"]]])
def test_rows_without_atoms_are_refused_at_the_start(atoms):
    with pytest.raises(ValueError, match='has no "vqa_list" of \\[question, answer\\]'):
        rows(None, "soft_tifa", [{"vqa_list": atoms}])


def test_a_rubric_is_the_weighted_mean_of_its_questions(tmp_path):
    rubric = [
        {"question": "Is it {prompt}?", "weight": 3, "name": "fits"},
        {"question": "Has it a watermark?", "answer": "no"},
        {"question": "A, B or C?", "answer": "B", "others": ["A", "C"]},
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rubric))
    seen, said = [], iter([0.5, 0.8, 0.2])
    score = lambda q: seen.append(q) or next(said)  # noqa: E731
    found = rows(score, "rubric", [{}], rubric=str(tmp_path / "r.jsonl"))
    np.testing.assert_allclose(found["rubric"], [(3 * 0.5 + 0.8 + 0.2) / 5])
    assert found["rubric_fits"].tolist() == [0.5]
    assert [(q.text, q.answer, q.others) for q in seen] == [
        ("Is it prompt 0?", "yes", ("no",)),
        ("Has it a watermark?", "no", ("yes",)),
        ("A, B or C?", "B", ("A", "C")),
    ]


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ('{"question": 3}', "question"),
        ('{"question": "Q", "weight": 0}', "weight"),
        ('{"question": "Q", "weight": "3"}', "weight"),
        ('{"question": "Q", "others": "no"}', "others"),
        ('{"question": "Q", "others": [1]}', "others"),
        ('{"question": "Q", "name": "a/b"}', "name"),
        ('{"question": "Q", "name": "low"}', "name"),
        ('{"question": "Q", "wieght": 1}', "wieght"),
        ("[]", "question"),
    ],
)
def test_a_rubrics_mistake_is_named_with_its_line(row, wrong, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"question": "Q"}\n' + row + "\n")
    with pytest.raises(ValueError, match=f"r.jsonl, line 2: {wrong}"):
        rows(None, "rubric", [{}], rubric=str(path))


def test_an_editing_judge_sees_the_references_and_the_edited_picture_last():
    seen, said = [], iter([0.5, 0.8, 0.2, 1.0, 1.0, 0.0])
    references = [(PICTURES[3],), (PICTURES[4], PICTURES[5])]
    found = rows(
        lambda q: seen.append(q) or next(said),
        "editing",
        [{"image": "a.png"}] * 2,
        references,
    )
    np.testing.assert_allclose(found["editing"], [0.08 ** (1 / 3), 0])
    assert found["editing_preserved"].tolist() == [0.8, 1.0]
    for number, question in enumerate(seen):
        edited, of = PICTURES[number // 3], references[number // 3]
        assert all(a is b for a, b in zip(question.images, (*of, edited), strict=True))
        assert f"prompt {number // 3}" in question.text
        assert (question.answer, question.others) == ("yes", ("no",))
    with pytest.raises(ValueError, match="has no reference image"):
        rows(None, "editing", [{}])


def test_a_run_trains_on_a_judge_and_an_endpoint_gives_it_the_same(folders, files, ask, tmp_path):
    """The endpoint is the local judge's model behind HTTP; it lists all its tokens."""
    hand, judge = ByHand(folders["qwen2_5_vl"]), str(folders["qwen2_5_vl"])

    def reply(images, text, count):
        found = sorted(hand.tokens(images, text).items(), key=lambda pair: -pair[1])
        return logged(*((token, p(value)) for token, value in found))

    from judging import Endpoint

    endpoint, metrics = Endpoint(reply), []
    for where in ({"rewards__vlm": judge}, {"rewards__vlm_url": endpoint.url}):
        keys = {
            "reward_fn": {"vqascore": 1.0},
            "num_epochs": 1,
            "logdir": tmp_path / str(where)[:16],
        }
        run = running.train(
            running.arguments(files, rewards__judge_timeout_s=HANG_S, **keys, **where)
        )
        metrics.append(running.metrics(run.folder))
    endpoint.close()
    for ours, theirs in zip(*metrics, strict=True):
        if ours["kind"] in ("eval", "epoch"):
            found = [key for key in ours if "vqascore" in key]
            assert found
            np.testing.assert_allclose(
                *([row[k] for k in found] for row in (ours, theirs)), atol=1e-5
            )
    assert any(row["kind"] == "update" and row["grad_norm"] > 0 for row in metrics[0])
