"""A script: what trained models answer greedily, loaded plainly (transformers, PEFT) and in vLLM.

It reads `{"prompts": [...], "models": [{"model": folder, "adapters": [[for PEFT, for vLLM], ...]}, ...]}` from
standard input and prints `ANSWERS` and `{folder (of the model, or of PEFT's adapter): [plain, served]}`.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LENGTH = 8
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
Answers = dict[str, list[list[str]]]


def greedy_answers(prompts: list[str], models: list[dict[str, Any]]) -> Answers:
    """Run this script in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__))],
        input=json.dumps({"prompts": prompts, "models": models}),
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **ENVIRONMENT},
    )
    assert "ANSWERS" in done.stdout, done.stderr[-3000:]
    answers: Answers = json.loads(done.stdout.split("ANSWERS")[1])
    return answers


def _plain(model: Any, tokenizer: Any, chats: list[Any]) -> list[str]:
    import torch

    answers = []
    for chat in chats:
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False
            )
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def _served(model: str, adapters: list[str | None], chats: list[Any]) -> list[list[str]]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    lora = {"enable_lora": True, "max_lora_rank": 8} if any(adapters) else {}
    llm = LLM(model, dtype="float32", enforce_eager=True, distributed_executor_backend="uni", max_model_len=128, **lora)
    greedy = SamplingParams(temperature=0.0, max_tokens=LENGTH)
    answers = []
    for number, adapter in enumerate(adapters, start=1):
        request = LoRARequest(adapter, number, adapter) if adapter else None
        written = llm.chat(chats, greedy, use_tqdm=False, lora_request=request)
        answers.append([one.outputs[0].text for one in written])
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return answers


def main() -> None:
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = json.load(sys.stdin)
    chats = [[{"role": "user", "content": prompt}] for prompt in asked["prompts"]]
    answers: Answers = {}
    for entry in asked["models"]:
        model, adapters = entry["model"], entry.get("adapters", [])
        tokenizer = AutoTokenizer.from_pretrained(model)
        plain = {}
        for for_peft, _ in adapters or [(None, None)]:
            loaded: Any = AutoModelForCausalLM.from_pretrained(model)
            if for_peft:
                loaded = peft.PeftModel.from_pretrained(loaded, for_peft)
            plain[for_peft or model] = _plain(loaded.eval(), tokenizer, chats)
        served = _served(model, [for_vllm for _, for_vllm in adapters] or [None], chats)
        answers |= {name: [mine, theirs] for (name, mine), theirs in zip(plain.items(), served, strict=True)}
    print("ANSWERS" + json.dumps(answers))


if __name__ == "__main__":
    main()
