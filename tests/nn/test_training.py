"""Training over packed layers: checkpointing, Trainer, compilation, memory, precision, processes."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainingArguments

from models import close, inputs, outputs, packed, same

# Names that transformers 5.23 renamed, and that the oldest release we work with knows.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


def loss(model, **more):
    words = inputs(model)
    return model(**words, labels=words["input_ids"], **more).loss


def gradients(model):
    model.zero_grad()
    loss(model).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient(made, name, reentrant):
    model = made(name).start().train()
    plain = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert len(plain) == 2 * len(packed(model))
    assert same(gradients(model), plain)


def test_gradient_checkpointing_with_packed_tables(made):
    model = made("llama", embeddings=True).start().train()
    plain = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert same(gradients(model), plain)


def test_nothing_of_a_weights_shape_is_kept_for_backward(made):
    model = made("llama").start()
    dense = {tuple(layer.dequantize().shape) for layer in packed(model).values()}
    floats = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: floats.append(t) or t, lambda t: t):
        loss(model)
    own = {p.data_ptr() for p in model.parameters()}
    kept = {tuple(t.shape) for t in floats if t.is_floating_point() and t.data_ptr() not in own}
    assert kept
    assert not kept & (dense | {shape[::-1] for shape in dense})


@pytest.mark.parametrize("bits", [2, 8])
def test_an_average_over_steps_has_the_codes(made, bits):
    """PyTorch averages integers too, and rounds down."""
    model = made("llama", bits=bits, embeddings=True).start()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        averaged.update_parameters(model)
    assert close(outputs(averaged.module), outputs(model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    averaged.update_parameters(model)
    after, mean = (next(p for p in m.parameters() if p.requires_grad) for m in (model, averaged))
    torch.testing.assert_close(mean, (0.9 + 0.1 * 1.5) * after / 1.5)


@pytest.mark.slow
def test_compiled_in_one_graph_it_computes_and_trains_the_same(made):
    model = made("llama-flat").start()
    eager, wanted = outputs(model).detach(), gradients(model)
    model.zero_grad()
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    words = inputs(model)
    result = model(**words, labels=words["input_ids"])
    assert close(result.logits.detach(), eager, 1e-6)
    result.loss.backward()
    for name, parameter in model.named_parameters():
        if name in wanted:
            assert close(parameter.grad, wanted[name], 1e-5), name


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_autocast(made, name):
    checkpoint = made(name, embeddings=True)
    model, dense = checkpoint.load(), checkpoint.backbone()
    with torch.no_grad():
        exact = outputs(dense)
        with torch.autocast("cpu", torch.bfloat16):
            ours, plain = outputs(model), outputs(dense)
    assert (ours - exact).abs().mean() <= 1.1 * (plain - exact).abs().mean()


def test_copies_of_a_whole_model(made):
    model = made("bert", embeddings=True).start()
    with torch.no_grad():
        wanted = outputs(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert same(twin.state_dict(), model.state_dict())
            assert torch.equal(outputs(twin), wanted)
        base = pickle.loads(pickle.dumps(made("bert").load()))
        assert torch.equal(outputs(base), outputs(made("bert").load()))


def test_a_model_moved_to_another_precision_keeps_its_scales(made):
    model = made("llama").load().to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if not n.endswith(("_proj.weight", "_scale"))} == {
        torch.bfloat16
    }
    before = made("llama").load().state_dict()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if "_proj" in n)
    with torch.no_grad():
        assert outputs(model).dtype == torch.bfloat16


class Words(torch.utils.data.Dataset):
    """Eight sentences."""

    def __init__(self, model):
        self.words = inputs(model, batch=8)["input_ids"]

    def __len__(self):
        return len(self.words)

    def __getitem__(self, index):
        return {"input_ids": self.words[index], "labels": self.words[index]}


def trainer(model, directory, **options):
    arguments = TrainingArguments(
        str(directory),
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=Words(model))


def losses(trained):
    return [row["loss"] for row in trained.state.log_history if "loss" in row]


# accelerate asks for pinned memory, which a machine without an accelerator does not have
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_trainer_learns_saves_and_resumes(made, tmp_path):
    checkpoint = made("llama")
    whole = trainer(checkpoint.start(), tmp_path)
    backbone = {n: t.clone() for n, t in whole.model.state_dict().items() if "lora_" not in n}
    whole.train()
    assert len(losses(whole)) == 4
    assert losses(whole)[-1] < losses(whole)[0]
    assert same({n: t for n, t in whole.model.state_dict().items() if "lora_" not in n}, backbone)
    resumed = trainer(checkpoint.start(), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert same(get_peft_model_state_dict(resumed.model), get_peft_model_state_dict(whole.model))


def test_trainer_refuses_a_bare_packed_model(made, tmp_path):
    with pytest.raises(ValueError, match="You cannot perform fine-tuning on purely quantized models"):
        trainer(made("llama").load(), tmp_path)
