"""What a model is given: tokens, masks and labels, for every kind of task; and that padding changes nothing."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from datasets import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from loftq.errors import InputError, NumericalError, UsageError
from loftq.finetune.evaluate import evaluate
from loftq.finetune.tasks import get_task, loops, score
from loftq.finetune.tasks.base import Measuring

SENTENCES = ["a cat", "the dog ran off", "so", "what a day it was", "no"]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
PROMPTS = {"prompt": ["ab", "abcdefgh", "x", "12345"], "response": ["cd", "ij", "yz, and more", "6"]}


def own(kind, columns, **more):
    return get_task({"kind": kind, "columns": columns, **more})


def pairs():
    return Dataset.from_dict({"text": SENTENCES, "text_pair": SENTENCES[::-1], "label": [0, 1, 1, 0, 1]})


def instruction(**more):
    return own("instruction", {"prompt": "prompt", "response": "response"}, **{"max_length": 64, **more})


def quiet(tmp_path, cls=TrainingArguments, **more):
    return cls(str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True, **more)


# classification


def test_pairs_are_cut_and_padded(words):
    task = get_task("rte", max_length=12)
    prepared = task.prepare(pairs(), words, train=True)
    assert max(map(len, prepared["input_ids"])) == 12
    batch = task.collator(words)(list(prepared))
    assert batch["input_ids"].shape == (5, 12)
    assert batch["labels"].tolist() == [0, 1, 1, 0, 1]
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == words.pad_token_id)
    assert words.decode(batch["input_ids"][2], skip_special_tokens=True).replace(" ", "") == "soso"


def test_numbers_stay_numbers(words):
    task = get_task("stsb")
    rows = pairs().remove_columns("label").add_column("label", [0.0, 1.25, 5.0, 3.0, 2.0])
    batch = task.collator(words)(list(task.prepare(rows, words, train=True)))
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"][1] == 1.25


# plain text


@pytest.mark.parametrize("rows", ["lines", "documents"])
def test_blocks_of_text(rows, letters):
    task = own("causal-lm", {"text": "text"}, rows=rows, max_length=5)
    data = Dataset.from_dict({"text": ["abc", " ", "defg\n"]})
    prepared = task.prepare(data, letters, train=True)
    stream = "<s>abc\n<s><s>defg\n" if rows == "lines" else "abc</s> </s>defg\n</s>"
    assert [len(block) for block in prepared["input_ids"]] == [5, 5]
    assert stream.startswith("".join(map(letters.decode, prepared["input_ids"])))
    assert prepared["labels"][:] == prepared["input_ids"][:]


def test_a_text_shorter_than_a_block(letters):
    task = own("causal-lm", {"text": "text"}, max_length=100)
    prepared = task.prepare(Dataset.from_dict({"text": ["abc"]}), letters, train=False)
    assert letters.decode(prepared["input_ids"][0]) == "abc</s>"
    with pytest.raises(InputError, match="no tokens to predict"):
        task.prepare(Dataset.from_dict({"text": [""]}), letters, train=False)


# summaries


def test_summaries_are_cut_and_padded_with_ignored_labels(words):
    task = get_task("xsum", max_length=8, max_target_length=5)
    rows = Dataset.from_dict({"document": ["a long document", "so"], "summary": ["a long summary", "s"]})
    model = tiny_models.model("summarization")
    batch = task.collator(words, model)(list(task.prepare(rows, words, train=True)))
    assert batch["input_ids"].shape == (2, 8)
    assert batch["labels"].shape == (2, 5)
    assert batch["labels"][1].tolist()[3:] == [-100, -100]
    assert (batch["labels"][0] >= 0).all()
    assert batch["decoder_input_ids"][1].tolist()[:3] == [model.config.decoder_start_token_id, *batch["labels"][1][:2]]
    assert batch["attention_mask"][1].tolist() == [1] * 4 + [0] * 4


def test_a_prefix_comes_before_the_document(words):
    task = own("summarization", {"document": "d", "summary": "s"}, prefix="sum:", max_length=32)
    prepared = task.prepare(Dataset.from_dict({"document": ["x"], "summary": ["y"]}), words, train=True)
    assert words.decode(prepared["input_ids"][0], skip_special_tokens=True) == "s u m : x"


def test_a_decoder_cannot_summarize(words):
    with pytest.raises(UsageError, match="xsum needs a model with an encoder and a decoder"):
        get_task("xsum").check(tiny_models.model("causal-lm").config)


# prompts and conversations


def learned(batch, row, tokenizer):
    labels = batch["labels"][row]
    return tokenizer.decode(labels[labels >= 0])


def test_only_the_response_is_learned(letters):
    task = instruction(template="Q: {prompt}\nA: ")
    prepared = task.prepare(Dataset.from_dict(PROMPTS), letters, train=True)
    batch = task.collator(letters)(list(prepared))
    assert letters.decode(prepared["input_ids"][0]) == "<s>Q: ab\nA: cd</s>"
    assert [learned(batch, row, letters) for row in range(4)] == ["cd</s>", "ij</s>", "yz, and more</s>", "6</s>"]
    kept = batch["attention_mask"].bool()
    assert (batch["labels"][~kept] == -100).all()
    assert torch.equal(kept.sum(1), torch.tensor([len(ids) for ids in prepared["input_ids"]]))
    assert letters.pad_token is None  # the user's tokenizer is left alone


def test_a_long_response_is_cut_and_a_long_prompt_refused(letters):
    rows = Dataset.from_dict({"prompt": ["ab", "abcdef"], "response": ["cdefgh", "x"]})
    task = instruction(template="{prompt}", max_length=8)
    prepared = task.prepare(rows, letters, train=True)
    assert [len(ids) for ids in prepared["input_ids"]] == [8, 8]
    assert prepared["labels"][0] == [-100] * 3 + prepared["input_ids"][0][3:]
    task = instruction(template="{prompt}", max_length=7)
    with pytest.raises(InputError, match="row 2: the prompt alone fills max_length 7; raise it"):
        task.prepare(rows, letters, train=True)


def test_conversations_by_the_template_of_the_tokenizer():
    tokenizer = tiny_models.letters(chat_template=tiny_models.CHAT)
    task = own("instruction", {"messages": "messages"})
    rows = Dataset.from_list([{"messages": CHAT}, {"messages": [{"role": "system", "content": "s"}, *CHAT, *CHAT]}])
    prepared = task.prepare(rows, tokenizer, train=True)
    batch = task.collator(tokenizer)(list(prepared))
    assert tokenizer.decode(prepared["input_ids"][1]) == "<system>s<user>hi<assistant>yo</s><user>hi<assistant>yo</s>"
    assert [learned(batch, row, tokenizer) for row in (0, 1)] == ["yo</s>", "yo</s>yo</s>"]
    prompts = task.prompts(rows, tokenizer)  # type: ignore[attr-defined]
    assert tokenizer.decode(prompts["input_ids"][0]) == "<user>hi<assistant>"


def test_templates_that_cannot_be_used():
    task = own("instruction", {"messages": "messages"})
    rows = Dataset.from_list([{"messages": [*CHAT, *CHAT]}])
    with pytest.raises(UsageError, match="no chat template for the column messages"):
        task.prepare(rows, tiny_models.letters(), train=True)
    forgetful = tiny_models.CHAT.replace("{{ m.content }}", "{{ m.content if loop.last }}")
    with pytest.raises(UsageError, match="rewrites earlier turns"):
        task.prepare(rows, tiny_models.letters(chat_template=forgetful), train=True)


def test_a_conversation_that_a_template_refuses_is_named():
    picky = tiny_models.CHAT.replace("{% for", "{% if messages[0].role == 'system' %}{{ 1 / 0 }}{% endif %}{% for", 1)
    picky = picky.replace("{{ 1 / 0 }}", "{{ raise_exception('no system') }}")
    task, tokenizer = own("instruction", {"messages": "messages"}), tiny_models.letters(chat_template=picky)
    rows = Dataset.from_list([{"messages": CHAT}, {"messages": [{"role": "system", "content": "s"}, *CHAT]}])
    with pytest.raises(InputError, match="row 2: the tokenizer's chat template refuses it: no system"):
        task.prepare(rows, tokenizer, train=True)


def test_a_last_prompt_that_leaves_no_room_for_an_answer_is_refused():
    """A conversation has answers before it, which are learned; generated is only the last."""
    tokenizer = tiny_models.letters(chat_template=tiny_models.CHAT)
    rows = Dataset.from_list([{"messages": [*CHAT, {"role": "user", "content": "a" * 40}, CHAT[1]]}])
    task = own("instruction", {"messages": "messages"}, answer="text", max_length=40)
    assert len(task.prepare(rows, tokenizer, train=True)) == 1
    with pytest.raises(InputError, match="row 1: the prompt alone fills max_length 40"):
        task.prepare(rows, tokenizer, train=False)


def test_answers_that_are_cut_are_told(letters, caplog):
    rows = Dataset.from_dict({"prompt": ["a", "b"], "response": ["c" * 30, "d"]})
    for _ in range(2):
        instruction(name="cutting").limited(max_length=20).prepare(rows, letters, train=True)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "1 of 2 rows are longer than max_length 20 and are cut" in line


# measuring


def test_generation_does_not_depend_on_the_batch(letters):
    """Prompts of several lengths, padded on the left, go on as each does alone."""
    task = instruction(answer="text")
    rows, model = Dataset.from_dict(PROMPTS), tiny_models.model("instruction")
    left, texts = tiny_models.letters(pad_token="</s>", padding_side="left"), {}
    prompts = task.prompts(rows, letters)  # type: ignore[attr-defined]
    from loftq.finetune.tasks import batches

    collate = batches.pad_inputs(left)
    assert collate(list(prompts))["attention_mask"][0].tolist()[0] == 0
    for size in (1, 4):
        options = Measuring(size, {**task.generation_options(), "max_new_tokens": 6}, progress=False)
        texts[size] = loops.generate(model, left, prompts, collate, options)
    assert texts[1] == texts[4]
    assert len(set(texts[1])) > 1


def test_sampling_repeats_itself_and_leaves_the_random_numbers_alone(letters):
    task = instruction(answer="text")
    rows, model = Dataset.from_dict(PROMPTS), tiny_models.model("instruction")
    options = {"do_sample": True, "temperature": 2.0, "seed": 42, "max_new_tokens": 4}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    figures = [score(task, model, letters, rows, generation=options, progress=False) for _ in range(2)]
    assert torch.rand(1) == expected
    assert figures[0] == figures[1]


def test_sampling_without_a_seed_repeats_itself_too(letters, monkeypatch):
    task, rows, model = instruction(answer="text"), Dataset.from_dict(PROMPTS), tiny_models.model("instruction")
    texts, whole = [], loops.generate
    monkeypatch.setattr(loops, "generate", lambda *given: texts.append(whole(*given)) or texts[-1])
    for seed in (1, 2):
        torch.manual_seed(seed)
        score(task, model, letters, rows, generation={"do_sample": True, "max_new_tokens": 8}, progress=False)
    assert texts[0] == texts[1]


def test_a_text_ends_where_the_positions_do(letters):
    """GPT-2 has no place for a token beyond them."""
    config = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=24)
    rows = Dataset.from_dict({"prompt": ["a" * 20, "b"], "response": ["c", "d"]})
    task = instruction(answer="text").limited(max_length=24)
    figures = score(task, transformers.GPT2LMHeadModel(config), letters, rows, progress=False)
    assert figures["n"] == 2


def test_perplexity_does_not_depend_on_the_batch_or_the_side_of_padding(letters):
    """GPT-2 counts positions from the first token of the row, padding or not."""
    config = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    rows = Dataset.from_dict({"prompt": ["a", "b" * 20, "c" * 9], "response": ["x" * 9, "y", "z" * 5]})
    tokenizer = tiny_models.letters(padding_side="left")
    task = instruction().limited(max_length=40)
    one, *others = (score(task, model, tokenizer, rows, batch_size=n, progress=False) for n in (1, 2, 3))
    for other in others:
        assert other["perplexity"] == pytest.approx(one["perplexity"], rel=1e-5)


def test_gsm8k_is_sampled_as_in_the_paper_if_asked(letters, monkeypatch, tmp_path):
    tiny_models.model("instruction").save_pretrained(tmp_path / "model")
    letters.save_pretrained(tmp_path / "model")
    lines = [json.dumps({"question": f"{n} and 1?", "answer": f"{n} + 1\n#### {n + 1}"}) for n in range(3)]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    written, whole = [], loops.generate

    def generate(model, tokenizer, prompts, collate, options):
        short = dataclasses.replace(options, generation={**options.generation, "max_new_tokens": 8})
        written.append((dict(options.generation), whole(model, tokenizer, prompts, collate, short)))
        return written[-1][1]

    monkeypatch.setattr(loops, "generate", generate)
    for choice in (None, "greedy", "paper", "paper"):
        found = evaluate(str(tmp_path / "model"), task="gsm8k", data=str(tmp_path), max_length=200, generation=choice)
        assert found.metrics["n"] == 3
    assert written[0] == written[1] != written[2] == written[3]
    greedy, sampled = written[0][0], written[2][0]
    assert not greedy["do_sample"]
    paper = {"do_sample": True, "temperature": 0.1, "top_k": 40, "top_p": 0.95, "seed": 42}
    assert sampled == {**greedy, **paper}


def test_exact_match_is_measured_on_the_generated_text(letters, monkeypatch):
    task = instruction(answer="number")
    rows = Dataset.from_dict({"prompt": ["a", "b"], "response": ["it is 1,000", "4"]})
    monkeypatch.setattr(loops, "generate", lambda *_: ["so 1000.0", "no idea"])
    figures = score(task, tiny_models.model("instruction"), letters, rows, progress=False)
    assert figures["exact_match"] == 50.0


@pytest.mark.parametrize("name", ["rte", "mrpc", "stsb"])
def test_as_a_trainer_evaluates_classification(name, words, tmp_path):
    task = get_task(name)
    rows = pairs() if name != "stsb" else pairs().remove_columns("label").add_column("label", [0.0, 1.5, 5.0, 3.0, 2.0])
    model = tiny_models.model(task.kind, **task.model_options())
    prepared = task.prepare(rows, words, train=False)
    trainer = Trainer(
        model,
        quiet(tmp_path, label_names=list(task.label_names)),
        data_collator=task.collator(words, model),
        compute_metrics=task.trainer_metrics(rows, prepared, words),
    )
    theirs = trainer.evaluate(prepared)
    ours = score(task, model, words, rows, batch_size=3, progress=False)
    for metric in task.metrics:  # type: ignore[attr-defined]
        assert theirs[f"eval_{metric}"] == pytest.approx(ours[metric], abs=1e-2)  # float32 and its order of sums


def test_as_a_trainer_evaluates_questions(words, tmp_path):
    task = get_task("squad", max_length=30, doc_stride=8)
    context = "the cat sat on the mat and the dog ran off the mat"
    rows = Dataset.from_list(
        [
            {"id": q, "context": context, "question": q, "answers": {"text": ["the mat"], "answer_start": [15]}}
            for q in ("where?", "what?", "why")
        ]
    )
    model = tiny_models.model(task.kind)
    prepared = task.prepare(rows, words, train=False)
    trainer = Trainer(
        model,
        quiet(tmp_path, label_names=list(task.label_names)),
        data_collator=task.collator(words, model),
        compute_metrics=task.trainer_metrics(rows, prepared, words),
    )
    theirs = trainer.evaluate(prepared)
    ours = score(task, model, words, rows, batch_size=2, progress=False)
    assert theirs["eval_f1"] == pytest.approx(ours["f1"])
    assert np.isfinite(theirs["eval_loss"])


def test_as_a_trainer_evaluates_summaries(words, tmp_path):
    task = get_task("xsum", max_length=40, max_target_length=8)
    rows = Dataset.from_dict({"document": SENTENCES, "summary": SENTENCES[::-1]})
    model = tiny_models.model(task.kind)
    prepared = task.prepare(rows, words, train=False)
    arguments = quiet(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=9)
    compute = task.trainer_metrics(rows, prepared, words)
    trainer = Seq2SeqTrainer(model, arguments, data_collator=task.collator(words, model), compute_metrics=compute)
    theirs = trainer.evaluate(prepared)
    ours = score(task, model, words, rows, batch_size=2, progress=False)
    assert theirs["eval_rouge1"] == pytest.approx(ours["rouge1"])


def test_as_a_trainer_evaluates_text(letters, tmp_path):
    task = own("causal-lm", {"text": "text"}, max_length=8)
    rows = Dataset.from_dict({"text": SENTENCES})
    model = tiny_models.model("causal-lm")
    trainer = Trainer(
        model,
        quiet(tmp_path, prediction_loss_only=True, label_names=["labels"]),
        data_collator=task.collator(letters, model),
    )
    prepared = task.prepare(rows, letters, train=False)
    ours = score(task, model, letters, rows, batch_size=3, progress=False)
    assert trainer.evaluate(prepared)["eval_loss"] == pytest.approx(ours["log_perplexity"], rel=1e-5)
    assert ours["tokens"] == 7 * len(prepared)  # the first token of a block is not predicted


def test_the_mean_is_over_tokens_not_over_rows(letters):
    """Responses of different lengths: every token counts the same, in batches of any size."""
    task, rows = instruction(), Dataset.from_dict(PROMPTS)
    model = tiny_models.model("instruction")
    figures = [score(task, model, letters, rows, batch_size=size, progress=False) for size in (1, 2, 4)]
    assert figures[0]["tokens"] == 3 + 3 + 13 + 2
    for other in figures[1:]:
        assert other["log_perplexity"] == pytest.approx(figures[0]["log_perplexity"], rel=1e-5)


def test_the_mode_of_the_model_is_kept(words):
    task = get_task("sst2")
    rows = pairs().remove_columns("text_pair")
    model = tiny_models.model(task.kind).train()
    score(task, model, words, rows, progress=False)
    assert model.training


@pytest.mark.parametrize("name", ["sst2", "wikitext2", "xsum"])
def test_a_model_that_is_not_finite(name, words, letters):
    task = get_task(name, max_length=8)
    model = tiny_models.model(task.kind)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    columns = {"sst2": {"text": SENTENCES, "label": [0] * 5}, "wikitext2": {"text": SENTENCES}}
    rows = Dataset.from_dict(columns.get(name, {"document": SENTENCES, "summary": SENTENCES}))
    tokenizer = letters if name == "wikitext2" else words
    with pytest.raises(
        NumericalError, match=r"row 2 are not finite|is nan for the batch with row 1|next token are not"
    ):
        score(task, model, tokenizer, rows, progress=False)


def test_a_model_with_too_few_positions(letters):
    task = get_task("wikitext2")
    with pytest.raises(UsageError, match="max_length: 1024 tokens are more than the model's 256 positions; set max_le"):
        score(task, tiny_models.model("causal-lm"), letters, Dataset.from_dict({"text": ["a"]}))
