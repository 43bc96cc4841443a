"""Masks behind a context, filled by masked language models of several architectures."""

import json
import shutil
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedConfig,
    RobertaConfig,
)
from transformers.modeling_outputs import MaskedLMOutput

from runtime.errors import ModelUnavailable, NotEnoughMemory
from runtime.models import SEEDLING, find_model
from runtime.proposers.diffusion import MaskedModel
from runtime.text import Text

VOCABULARY, MASK_ID = 90, 95
SHAPE = {"vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0, "mask_token_id": MASK_ID}
DEEP = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
CONFIGS: Mapping[str, PreTrainedConfig] = {
    "bert": BertConfig(**SHAPE, **DEEP),
    "roberta": RobertaConfig(**SHAPE, **DEEP),
    "modernbert": ModernBertConfig(
        **SHAPE, **DEEP, bos_token_id=None, eos_token_id=None, cls_token_id=None, sep_token_id=None
    ),
    # Its head is no module of its own, and its activation no module at all.
    "distilbert": DistilBertConfig(**SHAPE, dim=32, n_layers=2, n_heads=2, hidden_dim=48),
}
HISTORY = [(7 * index * index + 3 * index) % VOCABULARY for index in range(60)]


@pytest.fixture(scope="module", params=CONFIGS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, with weights so wide that every token it fills in depends on the others."""
    directory: Path = tmp_path_factory.mktemp("masked") / request.param
    save_random(CONFIGS[request.param], directory)
    return directory


def save_random(config: PreTrainedConfig, directory: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=1.5 / weight.shape[-1] ** 0.5)
            else:
                weight.normal_(mean=1.0 if "norm" in name.lower() else 0.0, std=0.2)
    model.save_pretrained(directory)


def dense_logits(directory: Path, tokens: Sequence[int]) -> Tensor:
    """Transformers' own, at every position."""
    model = AutoModelForMaskedLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([tokens])).logits[0]
    return logits


def filled_densely(directory: Path, context: Sequence[int], count: int, steps: int) -> list[int]:
    """Low-confidence remasking, slow and obvious: each forward computes all logits."""
    tokens = [*context, *[MASK_ID] * count]
    for left in range(steps, 0, -1):
        masked = [position for position, token in enumerate(tokens) if token == MASK_ID]
        probabilities = dense_logits(directory, tokens)[:, :VOCABULARY].softmax(1)
        surest = sorted(masked, key=lambda position: -float(probabilities[position].max()))
        for position in surest[: -(-len(masked) // left)]:
            tokens[position] = int(probabilities[position].argmax())
    return tokens[len(context) :]


class Watched(MaskedModel):
    """Remembers the input and the masked positions of each forward."""

    def __init__(self, model: Any, mask_id: int, vocabulary: int, sink: int, window: int) -> None:
        self.forwards: list[tuple[list[int], list[int]]] = []
        super().__init__(model, mask_id, vocabulary, sink, window)
        self.forwards.clear()

    def logits(self, token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        self.forwards.append((list(token_ids), list(positions)))
        return super().logits(token_ids, positions)


@pytest.mark.parametrize("positions", [[0], [20, 21, 22, 23], [3, 11, 12, 19], list(range(24))])
def test_logits_at_chosen_positions_are_those_of_the_whole_model(directory: Path, positions: list[int]) -> None:
    tokens = [*HISTORY[:20], *[MASK_ID] * 4]
    logits = MaskedModel.load(directory, VOCABULARY).logits(tokens, positions)
    dense = dense_logits(directory, tokens)[positions]
    if len(positions) == len(tokens):
        assert torch.equal(logits, dense)
    # For fewer rows the matrix kernels of the head add up in another order.
    torch.testing.assert_close(logits, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("count", "steps"), [(1, 1), (8, 1), (8, 2), (8, 3), (7, 7), (24, 5)])
def test_a_fill_is_the_one_of_the_dense_model(directory: Path, count: int, steps: int) -> None:
    filled = MaskedModel.load(directory, VOCABULARY).fill(HISTORY[:20], count, steps)
    assert filled == filled_densely(directory, HISTORY[:20], count, steps)


@pytest.mark.parametrize(
    ("count", "steps", "masked"),
    [
        (8, 1, [8]),
        (8, 2, [8, 4]),
        (7, 3, [7, 4, 2]),
        (3, 3, [3, 2, 1]),
        (3, 9, [3, 2, 1]),
        (0, 2, []),
    ],
)
def test_a_fill_takes_a_forward_a_step_and_none_for_what_is_filled(
    directory: Path, count: int, steps: int, masked: list[int]
) -> None:
    model = Watched.load(directory, VOCABULARY)
    assert len(model.fill(HISTORY[:20], count, steps)) == count
    assert [len(positions) for _, positions in model.forwards] == masked


def test_a_forward_sees_the_first_tokens_the_last_ones_and_the_masks(directory: Path) -> None:
    model = Watched.load(directory, VOCABULARY, sink=3, window=10)
    filled = model.fill(array("I", HISTORY), 4, 2)
    bounded = [*HISTORY[:3], *HISTORY[-10:]]
    assert model.forwards[0] == ([*bounded, *[MASK_ID] * 4], [13, 14, 15, 16])
    assert {len(tokens) for tokens, _ in model.forwards} == {17}
    assert model.context(array("I", HISTORY)) == bounded
    assert model.context(bounded) == bounded
    assert model.fill(bounded, 4, 2) == filled


def test_a_short_history_is_seen_whole(directory: Path) -> None:
    model = MaskedModel.load(directory, VOCABULARY, sink=3, window=10)
    assert [model.context(HISTORY[:length]) for length in range(14)] == [HISTORY[:length] for length in range(14)]
    assert len(model.fill([], 4, 2)) == 4


def test_a_context_is_cut_to_what_the_model_takes(directory: Path) -> None:
    model = Watched.load(directory, VOCABULARY)
    history = HISTORY * 10
    for count in (1, 31, 60, 62):
        model.fill(history, count, 1)
    # Roberta counts its 64 positions from behind the padding token's, which is 0 here.
    longest = 63 if directory.name == "roberta" else 64
    assert [len(tokens) for tokens, _ in model.forwards] == [longest] * 4
    assert model.context(history, 31) == [*history[:4], *history[len(history) - (longest - 31 - 4) :]]
    assert len(model.fill(history, 100, 1)) == longest


def test_only_tokens_of_the_main_model_are_proposed(directory: Path) -> None:
    some = [3, 5, 8]
    model = MaskedModel(AutoModelForMaskedLM.from_pretrained(directory), some[0], 9)
    filled = [token for begin in range(40) for token in model.fill(HISTORY[begin : begin + 20], 8, 2)]
    assert set(filled) <= set(range(9)) - {some[0]}


def test_two_fills_of_the_same_history_are_equal(directory: Path) -> None:
    model = MaskedModel.load(directory, VOCABULARY)
    first = model.fill(HISTORY[:20], 8, 3)
    model.fill(HISTORY[20:50], 8, 3)
    assert model.fill(HISTORY[:20], 8, 3) == first


def test_the_mask_of_the_tokenizer_beside_the_model_goes_before_the_configurations(tmp_path: Path) -> None:
    save_random(CONFIGS["bert"], tmp_path)
    assert MaskedModel.load(tmp_path, VOCABULARY).mask_id == MASK_ID
    tokenizer = AutoTokenizer.from_pretrained(find_model(SEEDLING))
    tokenizer.save_pretrained(tmp_path)
    assert MaskedModel.load(tmp_path, VOCABULARY).mask_id == MASK_ID
    tokenizer.mask_token = "!"
    tokenizer.save_pretrained(tmp_path)
    assert MaskedModel.load(tmp_path, VOCABULARY).mask_id == tokenizer.convert_tokens_to_ids("!") != MASK_ID


def test_a_model_with_fewer_tokens_is_refused(directory: Path) -> None:
    with pytest.raises(ModelUnavailable, match="has 96 tokens and the model 97: they must share a tokenizer"):
        MaskedModel.load(directory, 97)


@pytest.mark.parametrize("mask_id", [None, 96, -1, "x", [1], 1.5, True], ids=repr)
def test_a_model_without_a_mask_is_refused(tmp_path: Path, mask_id: Any) -> None:
    save_random(CONFIGS["bert"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mask_token_id": mask_id}))
    with pytest.raises(ModelUnavailable, match="names no mask") as caught:
        MaskedModel.load(tmp_path, VOCABULARY)
    assert "\n" not in str(caught.value)


def test_what_is_no_masked_language_model_is_refused(tmp_path: Path, seedling: Path) -> None:
    for directory in (tmp_path / "nothing", shutil.copytree(seedling, tmp_path / "causal")):
        config = directory / "config.json"
        if config.exists():
            config.write_text(json.dumps(json.loads(config.read_text()) | {"mask_token_id": 1}))
        with pytest.raises(ModelUnavailable, match="holds no masked language model") as caught:
            MaskedModel.load(directory, VOCABULARY)
        assert "\n" not in str(caught.value)


def test_a_model_that_does_not_fit_in_memory_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    BertConfig(
        **SHAPE, **DEEP | {"hidden_size": 2**17, "intermediate_size": 2**20, "num_hidden_layers": 16}
    ).save_pretrained(tmp_path)

    with pytest.raises(NotEnoughMemory, match="give a smaller proposer_model") as caught:
        MaskedModel.load(tmp_path, VOCABULARY)
    assert "\n" not in str(caught.value)


def test_a_model_that_fits_alone_is_refused_where_others_will_take_the_memory(directory: Path) -> None:
    with pytest.raises(NotEnoughMemory, match="lower window, capacity or max_concurrent"):
        MaskedModel.load(directory, VOCABULARY, reserved=2**60)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    save_random(CONFIGS["bert"], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("bert.encoder.layer.0.output.dense.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelUnavailable, match=r"lack bert\.encoder\.layer\.0\.output\.dense\.weight"):
        MaskedModel.load(tmp_path, VOCABULARY)


class LookingAround(BertForMaskedLM):
    """Its head mixes positions."""

    def forward(self, input_ids: Tensor) -> Any:
        outputs = self.bert(input_ids=input_ids)
        outputs.logits = self.cls(outputs[0].cumsum(1))
        return outputs


class Headless(BertForMaskedLM):
    """Its base model does not hand hidden states on by their name."""

    def forward(self, input_ids: Tensor) -> Any:
        outputs = self.bert(input_ids=input_ids, return_dict=False)
        return MaskedLMOutput(logits=self.cls(outputs[0]))


@pytest.mark.parametrize("architecture", [LookingAround, Headless])
def test_a_head_that_cannot_be_applied_at_masks_alone_is_refused(architecture: type[BertForMaskedLM]) -> None:
    with pytest.raises(ModelUnavailable, match=f"{architecture.__name__} cannot run as a diffusion proposer"):
        MaskedModel(architecture(CONFIGS["bert"]), MASK_ID, VOCABULARY)


def test_the_bundled_sibling_copies_from_a_question_into_its_answer(seedling: Path) -> None:
    text = Text.load(seedling)
    asked = text.render([{"role": "user", "content": "What is the capital of France?"}])
    model = MaskedModel.load(seedling / "diffusion", 2048)
    filled = model.fill([*asked, *text.encode("The capital of")], 3, 3)
    assert text.decode(filled).startswith(" France is")
