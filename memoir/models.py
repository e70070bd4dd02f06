"""Host models: where a family keeps its blocks, how a model is run, and where it is loaded from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.pytorch_utils import Conv1D

from memoir.chat import ChatTemplate
from memoir.records import BadInput
from memoir.sites import PromptScope, Site, Tail, composes, device_of, input_of
from memoir.sources import locate, origin
from memoir.text import Batch, Encoder, Row, similar_lengths


@dataclass(frozen=True)
class Family:
    """The names of the parts that editing needs."""

    blocks: str  # of the network
    mlp: str  # of a block
    projection: str  # of the MLP
    final_norm: str  # of the network


_LLAMA = Family("model.layers", "mlp", "down_proj", "model.norm")
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "phi3", "olmo2", "granite"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _LLAMA),
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_5_text", "qwen3_moe"), _LLAMA),  # of qwen3_moe the dense blocks, if any
    "llama4_text": Family("model.layers", "feed_forward", "down_proj", "model.norm"),  # its dense blocks
    # the text part of a multimodal model
    "gemma3": Family("model.language_model.layers", "mlp", "down_proj", "model.language_model.norm"),
    "gptj": Family("transformer.h", "mlp", "fc_out", "transformer.ln_f"),
    "gpt2": Family("transformer.h", "mlp", "c_proj", "transformer.ln_f"),
    "gpt_neox": Family("gpt_neox.layers", "mlp", "dense_4h_to_h", "gpt_neox.final_layer_norm"),
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # how configurations count experts
# Of the options of `from_pretrained`, those that the tokenizer and the look-up on the hub need as well.
_HUB = ("revision", "code_revision", "token", "trust_remote_code", "cache_dir", "force_download", "local_files_only")
# What a configuration says about a session rather than about the function that the model computes.
_VOLATILE = {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"}


class LanguageModel:
    """A causal language model with its tokenizer, frozen, ready to be edited.

    network    the transformers model; its weights never change
    tokenizer  its tokenizer
    name       how reports call it
    chat       prompts are rendered as a user's turn with the tokenizer's chat template. In a chat with several turns,
               edits are matched with the words of the user's last turn only; the model still reads the earlier turns
    """

    def __init__(
        self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "", *, chat: bool = False
    ):
        kind = network.config.model_type
        self.config = network.config.get_text_config()
        if kind not in FAMILIES:
            if any(getattr(self.config, name, None) for name in _EXPERTS):
                raise ValueError(_no_site(f"{kind!r}", []))
            raise ValueError(f"model family {kind!r} is not supported; expected one of {', '.join(sorted(FAMILIES))}")
        if chat and not tokenizer.chat_template:
            raise ValueError(f"chat=True, but the tokenizer of {name or kind} has no chat template")
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name, self.family, self.chat = name or network.config.name_or_path, kind, chat
        template = ChatTemplate(tokenizer, self.name) if chat else None
        self.encoder = Encoder(tokenizer, self.context_length, template)
        self.scope = PromptScope()
        if template:
            self.scope.narrow = template.last_user_turn
        if tokenizer.eos_token_id is None:
            warnings.warn(
                f"the tokenizer of {self.name} has no EOS token: answers end at max_new_tokens, or at the end token "
                "that the network's generation config names",
                stacklevel=2,
            )
        elif tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        for module in network.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # Else bitsandbytes would repack its 4-bit weights on a CPU, and pass no gradient through them.
                module.support_avx512bf16_for_cpu = False
        self.weights: dict[str, str] | None = None  # where they come from, see `sources.origin`
        self.editor: Any = None
        self.rewrite: Callable[[Sequence[str]], list[str]] | None = None  # an editor's change of prompts, if it has one
        self._composes: dict[int, bool] = {}
        self._shared: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()
        self._paths = paths = FAMILIES[kind]
        self.blocks: nn.ModuleList = network.get_submodule(paths.blocks)
        self.final_norm: nn.Module = network.get_submodule(paths.final_norm)
        self.head: nn.Module = network.get_output_embeddings()
        # The blocks with one down-projection; the others are mixtures of experts, which have one for each expert.
        self.dense = [i for i, block in enumerate(self.blocks) if hasattr(getattr(block, paths.mlp), paths.projection)]
        if not self.dense:
            raise ValueError(_no_site(f"{self.name} ({kind})", []))

    @property
    def device(self) -> torch.device:
        """Where the model's input goes."""
        return device_of(self.network.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def context_length(self) -> int:
        """Tokens that fit."""
        return self.config.max_position_embeddings

    @property
    def start_token(self) -> int:
        """The token that a text sampled from nothing starts with: BOS, else EOS; ValueError without either."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is None and eos is None:
            raise ValueError(
                f"the tokenizer of {self.name} has no BOS and no EOS token, one of which a sampled text starts with; "
                "set tokenizer.bos_token, or prefixes=0"
            )
        return eos if bos is None else bos

    @property
    def stops(self) -> list[int]:
        """The tokens at which an answer ends: the generation config's, and the one that edits learn."""
        known = self.network.generation_config.eos_token_id
        tokens = [*(known if isinstance(known, list) else [known]), self.encoder.end]
        return list(dict.fromkeys(token for token in tokens if token is not None))

    def site(self, layer: int) -> Site:
        """The down-projection of a block, 0-based. IndexError names the layer and how many there are; ValueError, a
        block that is a mixture of experts, or the class of a projection that cannot be edited."""
        if not 0 <= layer < len(self.blocks):
            raise IndexError(f"layer {layer} does not exist; {self.name} has blocks 0 to {len(self.blocks) - 1}")
        if layer not in self.dense:
            raise ValueError(_no_site(f"layer {layer} of {self.name}", self.dense))
        block, paths = self.blocks[layer], self._paths
        mlp = getattr(block, paths.mlp)
        module = getattr(mlp, paths.projection)
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise BadInput(
                f"{paths.mlp}.{paths.projection} of layer {layer} of {self.name} is a {type(module).__name__}, "
                "expected nn.Linear or a subclass (bitsandbytes' are), or Conv1D; load the model without this "
                "quantisation, or from a GGUF file"
            )
        return Site(layer, f"{paths.blocks}.{layer}.{paths.mlp}.{paths.projection}", module, block, mlp)

    def tail(self, site: Site, batch: Batch) -> Tail:
        """A batch recorded at a site. Each layer is checked once for whether the blocks after it compose."""
        if site.layer not in self._composes:
            generator, size = torch.Generator().manual_seed(0), min(self.config.vocab_size, len(self.tokenizer))
            rows = [torch.randint(size, (length,), generator=generator).tolist() for length in (7, 4)]
            probe = self.encoder.pad([Row(tokens, [True] * len(tokens)) for tokens in rows]).to(self.device)
            self._composes[site.layer] = composes(self, site, probe)
            if not self._composes[site.layer]:
                warnings.warn(
                    f"the blocks of {self.name} ({self.family}) do more than add the output of {site.name}; "
                    "edits run the full network in every iteration, which is slower",
                    stacklevel=2,
                )
        return Tail.record(self, site, batch, composes=self._composes[site.layer])

    # Running ---------------------------------------------------------------------------------------------------------

    def encode(
        self, prompts: Sequence[str], targets: Sequence[str | None] | None = None, *, end: bool = False
    ) -> Batch:
        """Tokenize prompts, and targets behind them (a space between; None: no target). ValueError when a row exceeds
        the context.

        The prompt's tokens are the same with and without a target, so a fingerprint never depends on the answer.
        `end` adds the token that ends an answer (`Encoder.end`) behind each target to the learned tokens.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts is one text, expected a sequence of them: {prompts!r}")
        if not len(prompts):
            raise ValueError("no prompts, expected at least one")
        prompts = self.rewrite(prompts) if self.rewrite else prompts
        return self.encoder.pad(self.encoder.rows(prompts, targets, end=end)).to(self.device)

    def forward(self, batch: Batch, *, positions: int = 0) -> Tensor:
        """Logits (B × T × V), or of the last `positions` places only, under whatever editor is attached."""
        with self.scope.prompt(batch.prompt_mask):
            return self.network(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask.long(),
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=positions,
            ).logits

    def site_inputs(
        self, site: Site, prompts: Sequence[str], size: int = 32
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """A site's inputs, in batches of similar length: (row numbers, a (B × T × D), prompt mask (B × T))."""
        for rows in similar_lengths(prompts, size):
            batch = self.encode([prompts[i] for i in rows])
            with torch.no_grad():
                a = input_of(site, lambda batch=batch: self.forward(batch))
            yield rows, a, batch.prompt_mask

    @torch.no_grad()
    def generate(
        self, prompts: str | Sequence[str], *, max_new_tokens: int = 32, one_line: bool = False, **options: Any
    ) -> Any:
        """Continue prompts until the model stops; greedy unless `options` of transformers' `generate` say otherwise.

        one_line  stop also where a second line of text has begun, with its first token

        Returns one text for one prompt and a list for a list; with `num_return_sequences`, a list of texts per prompt.
        """
        alone = isinstance(prompts, str)
        if not alone and not len(prompts):
            return []
        guidance = options.get("guidance_scale", getattr(options.get("generation_config"), "guidance_scale", None))
        if guidance not in (None, 1):
            raise ValueError(
                f"guidance_scale = {guidance}: guidance also runs the answer without its prompt, and so without the "
                "edit that the prompt reads; expected 1"
            )
        if self.stops and "generation_config" not in options:
            options = {"eos_token_id": self.stops, **options}
        batch = self.encode([prompts] if alone else prompts)
        length = batch.input_ids.shape[1]
        room = self.context_length - length
        if room < 1:
            raise ValueError(f"the prompt fills the context of {self.context_length} tokens; no room for an answer")
        options = {"do_sample": False, "max_new_tokens": min(max_new_tokens, room), **options}
        if one_line:

            def second_line(ids: Tensor, scores: Any, **_: Any) -> Tensor:
                return torch.tensor(["\n" in text.strip() for text in self._texts(ids[:, length:])], device=ids.device)

            options["stopping_criteria"] = StoppingCriteriaList([*options.get("stopping_criteria", ()), second_line])
        with self.scope.prompt(batch.prompt_mask, generating=True):
            output = self._extended(batch.input_ids, batch.attention_mask.long(), **options)
        texts = [text.strip() for text in self._texts(getattr(output, "sequences", output)[:, length:])]
        each = len(texts) // len(batch)
        if each > 1:
            texts = [texts[start : start + each] for start in range(0, len(texts), each)]
        return texts[0] if alone else texts

    def _extended(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
        """What `generate` of transformers makes of tokens (B × T) int64, with their attention mask (None: all)."""
        mask = torch.ones_like(ids) if mask is None else mask
        options = {"pad_token_id": self.tokenizer.pad_token_id or 0, **options}
        return self.network.generate(input_ids=ids, attention_mask=mask, **options)

    def _texts(self, tokens: Tensor) -> list[str]:
        """Answers as text, tokens (B × T) int64."""
        rows = tokens.tolist()
        if self.tokenizer.pad_token_id is None:  # then padding looks like an answer, and has to be cut off
            rows = [row[: next((i for i, token in enumerate(row) if token in self.stops), None)] for row in rows]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    @contextlib.contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        """What is drawn inside depends on the seed alone, and what is drawn later on nothing inside."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    @torch.no_grad()
    def sample(self, count: int, tokens: int, *, seed: int, step: Callable[[], None] = lambda: None) -> list[str]:
        """Texts of `tokens` tokens, drawn from the model's own distribution, with the editor that is attached, if any.

        step  called after each token; it may raise
        """
        if not count:
            return []

        def check(ids: Tensor, scores: Any, **options: Any) -> Tensor:
            step()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        ids = torch.full((count, 1), self.start_token, device=self.device)
        options = dict(do_sample=True, top_k=0, min_new_tokens=tokens, max_new_tokens=tokens)
        with self._seeded(seed):
            out = self._extended(ids, **options, stopping_criteria=StoppingCriteriaList([check]))
        return [text.strip() for text in self.tokenizer.batch_decode(out[:, 1:], skip_special_tokens=True)]

    def continuations(self, texts: Sequence[str], tokens: int, *, seed: int) -> list[str]:
        """Each text with up to `tokens` tokens that the model adds, by its own generation settings; seeded."""
        coded = [torch.tensor([ids], device=self.device) for ids in self.encoder.tokens(texts)]
        with self._seeded(seed):
            extended = [self._extended(ids, max_new_tokens=tokens)[0] for ids in coded]
        return self.tokenizer.batch_decode(extended, skip_special_tokens=True)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, other editors may be attached; afterwards the present editor, or none, is attached again."""
        owner = self.editor
        try:
            yield
        finally:
            if owner is not None:
                owner.attach()
            elif self.editor is not None:
                self.editor.detach()

    def shared(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What compute() makes of the unedited model, one for all editors that ask for this key, as long as one of them
        keeps it; not to be changed."""
        if (value := self._shared.get(key)) is None:
            value = self._shared[key] = compute()
        return value

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the configuration and the weights: all up to 1 GB, beyond that 4096 spaced values of each."""
        return self._hashed()

    @cached_property
    def rounded(self) -> dict[str, str]:
        """By dtype, the same over 4096 spaced values of each weight, rounded to that dtype. The same weights in float32
        and in one of these have the same hash for it."""
        return {name: self._hashed(getattr(torch, name)) for name in ("bfloat16", "float16")}

    def _hashed(self, dtype: torch.dtype | None = None) -> str:
        network = self.network
        config = json.dumps(_lasting(network.config.to_dict()), sort_keys=True, default=str)
        digest = hashlib.sha256(config.encode())
        # Tied weights lose each other once they are offloaded; they are counted once all the same.
        parameters = {k: v for k, v in sorted(network.named_parameters()) if k not in network.all_tied_weights_keys}
        sampled = dtype is not None or sum(p.numel() * p.element_size() for p in parameters.values()) > 1e9
        for name, value in parameters.items():
            digest.update(f"{name}{tuple(value.shape)}{dtype or value.dtype}".encode())
            with align_module_device(network.get_submodule(name.rpartition(".")[0])):  # brings offloaded weights in
                flat = network.get_parameter(name).detach().flatten()
            if flat.device.type == "meta":
                continue  # a model that is only an outline has no values
            if sampled:
                flat = flat[:: max(1, flat.numel() // 4096)]
            flat = flat.to(dtype or flat.dtype)
            digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, {self.family}, {len(self.blocks)} blocks, {self.dtype}, {self.device})"


def _no_site(what: str, dense: Sequence[int]) -> str:
    others = f"dense blocks: {', '.join(map(str, dense))}" if dense else "a model with dense blocks"
    return (
        f"{what} is a mixture of experts: several down-projections, of which each token takes some, so there is no one "
        f"place to edit; expected {others}"
    )


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, and those inside it, without what is volatile."""
    return {k: _lasting(v) if isinstance(v, dict) else v for k, v in config.items() if k not in _VOLATILE}


# Loading -------------------------------------------------------------------------------------------------------------


def load_model(
    name: str | os.PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    chat: bool = False,
    **options: Any,
) -> LanguageModel:
    """Load a model with `AutoModelForCausalLM.from_pretrained`: "almanac" (invented, tiny), "smollm2" (real, small), a
    transformers folder, a GGUF file, which is dequantised once, or a hub id.

    dtype       default: float32 on a CPU, bfloat16 on a GPU
    device_map  default: the GPU where there is one; "auto" spreads a large model (accelerate)
    chat        render prompts as a user's turn with the tokenizer's chat template
    options     further arguments of `from_pretrained`; those about the hub (`revision`, `token`, …) hold for the
                tokenizer, too

    BadInput or FileNotFoundError names what cannot be loaded, weights that the folder lacks too.
    """
    if isinstance(dtype, str):
        if not isinstance(getattr(torch, dtype, None), torch.dtype) or not getattr(torch, dtype).is_floating_point:
            raise BadInput(f"dtype {dtype!r} is unknown; expected e.g. 'float32' or 'bfloat16'")
        dtype = getattr(torch, dtype)
    on_gpu = torch.cuda.is_available()
    if str(device_map).startswith("cuda") and not on_gpu:
        raise BadInput(
            f"device_map = {device_map!r}, but torch sees no NVIDIA GPU here; expected 'cpu', or a torch with CUDA"
        )
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    device_map = device_map or ("cuda" if on_gpu else None)
    hub = {option: options[option] for option in _HUB if option in options}
    path, short = locate(os.fspath(name), **hub)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **hub)
        network, loading = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, device_map=device_map, output_loading_info=True, **options
        )
    except Exception as error:  # whatever a damaged folder, a family unknown to transformers, or full memory leads to
        raise BadInput(f"model {name} cannot be loaded: {type(error).__name__}: {error}") from error
    if missing := sorted(loading["missing_keys"]):  # transformers would go on with random numbers in their place
        raise BadInput(
            f"model {name} lacks {len(missing)} weights that its config.json asks for, first {missing[0]!r}; "
            "expected the whole model, with all its files"
        )
    model = LanguageModel(network, tokenizer, short, chat=chat)
    model.weights = origin(path, getattr(network.config, "_commit_hash", None))
    return model
