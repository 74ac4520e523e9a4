"""Chatting with real tiny models: what is streamed is what transformers generates."""

import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from cluster.models.chat import ChatModel, ChatOptions, answer, run_chat
from trainers.errors import UserError
from trainers.tiny_models import make_tokenizer

USER = [{"role": "user", "content": "37+48="}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=32,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def generated(model, tokenizer, messages, tokens):
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, do_sample=False, max_new_tokens=tokens)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_pieces_are_the_greedy_answer(folder):
    model = ChatModel(str(folder))
    pieces = list(model.stream(USER, ChatOptions(max_tokens=24, temperature=0)))
    assert "".join(pieces) == generated(model.model, model.tokenizer, USER, 24)
    assert len(pieces) > 1


def test_a_system_turn_comes_first(folder):
    model = ChatModel(str(folder))
    options = ChatOptions(max_tokens=16, temperature=0, system="Add.")
    expected = generated(model.model, model.tokenizer, [{"role": "system", "content": "Add."}, *USER], 16)
    assert "".join(model.stream(USER, options)) == expected


def test_a_reader_that_goes_away_ends_the_generation(folder):
    model = ChatModel(str(folder))
    stream = model.stream(USER, ChatOptions(max_tokens=100_000, temperature=0))
    next(stream)
    stream.close()  # returns only when the generating thread has ended


def test_an_error_while_generating_is_raised_not_waited_for(folder):
    model = ChatModel(str(folder))
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(model.stream(USER, ChatOptions(max_tokens=-1)))


def test_an_adapter_loads_with_its_base(folder, tmp_path):
    base = Qwen3ForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    chat = ChatModel(str(tmp_path))
    expected = generated(adapted.eval(), chat.tokenizer, USER, 16)
    assert "".join(chat.stream(USER, ChatOptions(max_tokens=16, temperature=0))) == expected


def test_a_model_without_chat_template_continues_text_and_takes_no_system_turn(folder, tmp_path):
    Qwen3ForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    model = ChatModel(str(tmp_path))
    ids = tokenizer("37+48=", return_tensors="pt")
    out = model.model.generate(**ids, do_sample=False, max_new_tokens=8)
    expected = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "".join(model.stream(USER, ChatOptions(max_tokens=8, temperature=0))) == expected
    with pytest.raises(UserError, match="no chat template"):
        list(model.stream(USER, ChatOptions(system="Add.")))


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_folder_that_is_no_model_is_a_user_error(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="no model to chat with"):
        ChatModel(str(tmp_path))


def test_one_shot_prints_both_answers_in_turn_without_a_terminal(folder, capsys):
    options = ChatOptions(max_tokens=8, temperature=0)
    assert run_chat(str(folder), base=str(folder), prompt="37+48=", options=options) == 0
    model = ChatModel(str(folder))
    text = generated(model.model, model.tokenizer, USER, 8)
    assert capsys.readouterr().out == f"base:\n{text}\ntrained:\n{text}\n"


def test_on_a_terminal_both_answers_stand_in_columns(folder):
    models = {label: ChatModel(str(folder)) for label in ("base", "trained")}
    console = Console(force_terminal=True, width=100, file=io.StringIO())
    texts = answer(models, dict.fromkeys(models, USER), ChatOptions(max_tokens=8, temperature=0), console)
    assert texts["base"] == texts["trained"] == generated(models["base"].model, models["base"].tokenizer, USER, 8)
    header = next(line for line in console.file.getvalue().splitlines() if "base" in line)
    assert "trained" in header


def test_a_conversation_ends_with_its_input_and_remembers(folder, monkeypatch, capsys):
    lines = iter(["37+48=", "", "again"])

    def read(self, *_, **__):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(Console, "input", read)
    assert run_chat(str(folder), base=None, prompt=None, options=ChatOptions(max_tokens=8, temperature=0)) == 0
    model = ChatModel(str(folder))
    first = generated(model.model, model.tokenizer, USER, 8)
    history = [*USER, {"role": "assistant", "content": first}, {"role": "user", "content": "again"}]
    assert capsys.readouterr().out == f"{first}\n{generated(model.model, model.tokenizer, history, 8)}\n"
