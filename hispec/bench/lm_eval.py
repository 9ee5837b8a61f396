"""Any hierarchy as a model of lm-evaluation-harness, for its generation tasks.

    python -m hispec.bench.lm_eval --model hispec --model_args model=M,hierarchy=hispec --tasks T

takes lm-eval's own options; from Python, ``simple_evaluate(model=HispecLM(model=…), …)``. Scores of
two hierarchies are equal because their tokens are. Needs ``pip install lm-eval``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from hispec.errors import HispecError
from hispec.loading import load
from hispec.result import Result
from hispec.sampling import Sampling


@register_model("hispec")
class HispecLM(LM):  # type: ignore[misc, unused-ignore]
    """Answers lm-eval's generation requests one at a time.

    Args:
        model: as ``--model``.
        hierarchy: as ``--hierarchy``.
        exits: as ``--exits``.
        dtype: as ``--dtype``.
        device: as ``--device``; lm-eval's ``cuda:0`` is ``cuda``.
        numerics: ``exact`` or ``fast``.
        max_gen_toks: new tokens where a task names no number.
        batch_size: lm-eval passes it; requests are answered one at a time whatever it says.
        max_batch_size: likewise.
    """

    def __init__(
        self,
        model: str,
        hierarchy: str = "auto",
        exits: str | None = None,
        dtype: str = "auto",
        device: str | None = "auto",
        numerics: str = "exact",
        max_gen_toks: int = 256,
        batch_size: Any = 1,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        place = (device or "auto").split(":")[0]
        self.lm = load(model, exits=exits, dtype=dtype, device=place, numerics=numerics)
        self.hierarchy = self.lm.hierarchy(hierarchy)
        self.max_gen_toks = int(max_gen_toks)
        self.results: list[Result] = []  # of all requests so far, with their counts

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's caches."""
        return self.lm.checkpoint.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the template that :meth:`apply_chat_template` uses."""
        return self.lm.tokenizer.chat_template

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a chat as the text of a prompt."""
        return str(
            self.lm.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the answers, cut before the strings that a task stops at."""
        answers = []
        for request in tqdm(requests, disable=disable_tqdm or None):
            context, options = request.args
            result = self._answer(context, dict(options))
            self.results.append(result)
            self.cache_hook.add_partial("generate_until", (context, options), result.text)
            answers.append(result.text)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuses: scoring given text decodes nothing, so no hierarchy plays a part in it."""
        raise HispecError(
            "hispec answers generation tasks only. Score given text with lm-eval's --model hf: a "
            "hierarchy changes no probability."
        )

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Refuses; see :meth:`loglikelihood`."""
        raise HispecError("hispec answers generation tasks only. Use lm-eval's --model hf.")

    def _answer(self, context: str, options: dict[str, Any]) -> Result:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        temperature = float(options.get("temperature") or 0.0)
        sampled = temperature > 0 and options.get("do_sample", True)
        sampling = Sampling(temperature=temperature) if sampled else Sampling()
        tokenizer, limit = self.lm.tokenizer, int(options.get("max_gen_toks", self.max_gen_toks))
        # A chat's text begins with the special tokens that the tokenizer would add once more.
        special = not (tokenizer.bos_token and context.startswith(tokenizer.bos_token))
        ids = list(tokenizer(context, add_special_tokens=special)["input_ids"])
        room = self.lm.model.config.max_positions - limit
        if room < 1:
            raise HispecError(f"max_gen_toks {limit} leaves no room for a prompt.")
        return self.lm.generate(
            ids[-room:],  # as lm-eval's own models do, the beginning of a long prompt is lost
            hierarchy=self.hierarchy,
            max_new_tokens=limit,
            stop=[stop for stop in stops if stop],
            sampling=sampling,
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
