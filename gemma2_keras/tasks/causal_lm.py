"""Gemma 2 as a causal language model: trains on text, generates text."""

from __future__ import annotations

from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from gemma2_keras.checkpoints import presets as preset_files
from gemma2_keras.errors import InputError
from gemma2_keras.models.gemma2_backbone import Gemma2Backbone
from gemma2_keras.models.inputs import check_graph_ids, check_ids, check_token_inputs, check_weights, is_traced
from gemma2_keras.models.known_presets import KnownPresets
from gemma2_keras.preprocessing.causal_lm_preprocessor import Gemma2CausalLMPreprocessor
from gemma2_keras.preprocessing.inputs import is_graph_tensor
from gemma2_keras.preprocessing.records import is_tokenized
from gemma2_keras.tasks.adapters import AdapterTask
from gemma2_keras.tasks.data import preprocessed
from gemma2_keras.tasks.distillation_loss import check_targets, split_targets
from gemma2_keras.tasks.exports import Exports
from gemma2_keras.tasks.generating import check_verbose
from gemma2_keras.tasks.perplexity import examples_of_text, examples_of_tokens, perplexities
from gemma2_keras.tasks.sources import StreamBatches
from gemma2_keras.tasks.token_training import TokenTraining

_SAMPLERS = ("beam", "contrastive", "greedy", "random", "top_k", "top_p")


@keras.saving.register_keras_serializable(package="gemma2_keras")
class Gemma2CausalLM(AdapterTask, Exports, TokenTraining):
    """Gemma 2 with its output projection: `fit` on text, `generate` text, as `keras_hub.models.CausalLM`.

    Called on `{"token_ids": (B, T) int32, "padding_mask": (B, T)}` it returns (B, T, V) float32 logits. As for the
    backbone, 0 in the mask is padding, and other numbers tell examples that are packed into a row apart.

    Args:
        backbone: a `Gemma2Backbone`.
        preprocessor: a `Gemma2CausalLMPreprocessor`; with `None`, data must be tokenized already.
        **kwargs: `name`, `trainable` and `compile`, as KerasHub's tasks take them.

    Raises:
        InputError: when called or trained on ids outside the vocabulary, a wrong dtype or shape, or no data.

    Example:

    >>> model = Gemma2CausalLM.from_preset("gemma2_tiny_en")
    >>> text = model.generate("The cat", max_new_tokens=8)
    >>> text.startswith("The cat")
    True
    """

    backbone_cls = Gemma2Backbone
    preprocessor_cls = Gemma2CausalLMPreprocessor
    presets = KnownPresets()

    def __init__(self, backbone, preprocessor=None, **kwargs) -> None:
        tokenizer = getattr(preprocessor, "tokenizer", None)
        # A layer that is being restored gets its vocabulary later.
        ids = 0 if tokenizer is None or tokenizer.proto is None else tokenizer.vocabulary_size()
        if ids > backbone.config.vocabulary_size:
            raise ValueError(
                f"The tokenizer has {ids} ids, more than the backbone's `vocabulary_size` of "
                f"{backbone.config.vocabulary_size}: they belong to different models."
            )
        self.backbone = backbone
        self.preprocessor = preprocessor
        inputs = backbone.input
        outputs = backbone.token_embedding(backbone(inputs), reverse=True)
        self.forget_programs()
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self.remember_adapters()

    def __call__(self, inputs, *args, **kwargs):
        """Check the inputs, then run the model."""
        check_token_inputs(inputs, self.backbone.config.vocabulary_size)
        return super().__call__(inputs, *args, **kwargs)

    # Loading

    @classmethod
    def from_preset(cls, preset, load_weights=True, *, dtype=None, check_finite=True, **kwargs):
        """Load a model by preset name, handle or folder.

        Args:
            preset: a name of `gemma2_keras.list_presets()`, a handle `hf://owner/name`, or a folder: one that
                `save_to_preset` wrote, or a checkpoint that transformers wrote.
            load_weights: `False` builds the architecture with random weights.
            dtype: a Keras dtype policy, such as `"bfloat16"`; `None` keeps the checkpoint's.
            check_finite: whether weights that are NaN or infinite are refused.
            **kwargs: as the constructor takes them; `preprocessor=None` leaves the preprocessor out.

        Raises:
            PresetError: if the name leads nowhere; the message has the nearest names.
            CheckpointError: if the files are not a whole Gemma 2 checkpoint.
        """
        preset_files.require_room(preset, dtype)
        if "preprocessor" not in kwargs:
            folder = preset_files.resolve(preset, weights=False)
            if preset_files.has_tokenizer(folder):
                kwargs["preprocessor"] = cls.preprocessor_cls.from_preset(folder)
        backbone = cls.backbone_cls.from_preset(preset, load_weights, dtype=dtype, check_finite=check_finite)
        return cls(backbone, **kwargs)

    # Training

    def compile(
        self, optimizer="auto", loss="auto", *, weighted_metrics="auto", sampler="greedy", remat=False, **kwargs
    ) -> None:
        """Choose optimizer, loss, metrics and sampler.

        Args:
            optimizer: as `keras.Model.compile`; `"auto"` is Adam with a learning rate of 2e-5.
            loss: likewise; `"auto"` is `NextTokenLoss()`, the cross-entropy of the next token, in nats, as the mean
                over the tokens that count; padding and prompts do not dilute it. With it, and with `DistillationLoss`,
                the (B, T, V) logits are never made, unless other metrics ask for them.
            weighted_metrics: likewise; `"auto"` is the share of next tokens that the model ranks first and, beside
                `NextTokenLoss`, the perplexity.
            sampler: how `generate` chooses tokens: a name of a KerasHub sampler, such as `"top_k"`, or an instance.
            remat: whether training keeps the inputs of each decoder block's two branches alone, and computes the rest
                again for the gradient: a quarter more work, for a fraction of the memory (not with JAX on a CPU,
                where XLA keeps all the same).
            **kwargs: as `keras.Model.compile` takes them.

        Raises:
            ValueError: if `sampler` is no name of a sampler, `remat` neither true nor false, or `loss` a
                `NextTokenLoss` that keeps a number for each token.
        """
        if isinstance(sampler, str) and sampler not in _SAMPLERS:
            raise ValueError(f"`sampler` must be one of {', '.join(_SAMPLERS)}, or an instance; given {sampler!r}.")
        if isinstance(sampler, type) or not (isinstance(sampler, str | dict) or callable(sampler)):
            raise ValueError(
                f"`sampler` must be one of {', '.join(_SAMPLERS)}, or an instance, such as "
                f"`keras_hub.samplers.TopKSampler(k=5)`; given {sampler!r}."
            )
        self.set_remat(remat)
        loss, weighted_metrics = self.compile_training(loss, weighted_metrics, kwargs)
        super().compile(optimizer, loss, weighted_metrics=weighted_metrics, sampler=sampler, **kwargs)
        self.forget_sampler()

    def get_compile_config(self) -> dict[str, Any]:
        """What `compile` was given, for a `.keras` file."""
        config = super().get_compile_config()
        if not config:
            return config
        # How many weights the optimizer follows; none before the first step.
        followed = len(self.trainable_variables) if self.optimizer is not None and self.optimizer.built else 0
        if self.watches_tokens:
            config["weighted_metrics"] = "auto"
        own = {"sampler": keras_hub.samplers.serialize(self.sampler), "remat": self.remat, "followed": followed}
        return {**config, **own}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as the saved model was; an optimizer that had made a step goes on from there."""
        config = dict(config)
        sampler, followed = keras_hub.samplers.deserialize(config.pop("sampler")), config.pop("followed")
        remat = config.pop("remat", False)
        self.compile(**keras.saving.deserialize_keras_object(config), sampler=sampler, remat=remat)
        if self.optimizer is not None and followed == len(self.trainable_variables):
            self.optimizer.build(self.trainable_variables)

    def preprocess_samples(self, x, y=None, sample_weight=None):
        """Text to `(x, y, sample_weight)`; tokenized data as it is, once its ids are checked."""
        if self.preprocessor is not None and not is_tokenized(x):
            # Not by `__call__`, for which Keras goes through every text, and repeats all of them in an error.
            return self.preprocessor.call(x, y=y, sample_weight=sample_weight)
        if not is_tokenized(x):
            raise InputError(
                'Without a preprocessor, data must be {"token_ids": …, "padding_mask": …} with labels `y`; '
                f"given {type(x).__name__}."
            )
        size = self.backbone.config.vocabulary_size
        check_token_inputs(x, size)
        check_weights(sample_weight)
        if y is not None:
            check_targets(y, sample_weight, size)
        for name, ids in (("token_ids", x["token_ids"]), ("y", None if y is None else split_targets(y)[0])):
            if is_graph_tensor(ids):
                check_graph_ids(ids, size, name)
        return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

    def fit(self, x=None, y=None, batch_size=None, *, sample_weight=None, validation_data=None, **kwargs):
        """Train, as `keras.Model.fit`, on text or on tokenized data.

        Args:
            x: strings, `{"prompts": …, "responses": …}`, conversations `{"messages": …}`, a list of records, all as
                `Gemma2CausalLMPreprocessor` takes them, or tokenized arrays; or a `tf.data.Dataset`, a
                `keras.utils.PyDataset`, a torch `DataLoader`, a Hugging Face `Dataset` or `IterableDataset`, a
                `MapDataset`, `IterDataset` or `DataLoader` of grain, or another iterator of them. Without
                `steps_per_epoch`, an `IterableDataset` and grain's are read whole before the first step.
            y: labels, only beside tokenized arrays; for `DistillationLoss` with a teacher's distributions.
            batch_size: examples in a step; 32 by default.
            sample_weight: finite weights, only beside tokenized arrays.
            validation_data: of the same kinds as `x`, or `(x, y)` or `(x, y, sample_weight)`.
            **kwargs: `epochs`, `callbacks`, `validation_split` and the like.

        Returns:
            `keras.callbacks.History`.

        Warns:
            UserWarning: if weights of bfloat16 or float16 would be trained, which lose most steps.
        """
        self.notice_adapters()
        self.notice_coarse_weights()
        x, y, sample_weight = preprocessed(
            self.preprocess_samples,
            x,
            y,
            sample_weight,
            batch_size=batch_size,
            steps=kwargs.get("steps_per_epoch"),
            shuffle=bool(kwargs.get("shuffle", True)),
        )
        if isinstance(x, StreamBatches):
            # Keras would warn that it cannot.
            kwargs["shuffle"] = False
        elif not isinstance(x, dict | keras.utils.PyDataset):
            # Of what comes in its own order Keras would warn, too, though nobody has asked for another.
            kwargs.setdefault("shuffle", False)
        if validation_data is not None:
            parts = validation_data if isinstance(validation_data, tuple) else (validation_data,)
            prepared = preprocessed(
                self.preprocess_samples,
                *parts,
                batch_size=kwargs.get("validation_batch_size") or batch_size,
                steps=kwargs.get("validation_steps"),
            )
            validation_data = keras.utils.pack_x_y_sample_weight(*prepared)
        return keras.Model.fit(
            self, x, y, batch_size, sample_weight=sample_weight, validation_data=validation_data, **kwargs
        )

    def evaluate(self, x=None, y=None, batch_size=None, *, sample_weight=None, **kwargs):
        """Loss and metrics, as `keras.Model.evaluate`, on what `fit` takes."""
        self.notice_adapters()
        # Validation within `fit` comes through here with data that is prepared already.
        if not kwargs.get("_use_cached_eval_dataset"):
            x, y, sample_weight = preprocessed(
                self.preprocess_samples, x, y, sample_weight, batch_size=batch_size, steps=kwargs.get("steps")
            )
        return keras.Model.evaluate(self, x, y, batch_size, sample_weight=sample_weight, **kwargs)

    def predict(self, x=None, batch_size=None, **kwargs):
        """(B, T, V) logits, as `keras.Model.predict`, of what `fit` takes."""
        self.notice_adapters()
        x, _, _ = preprocessed(self.preprocess_samples, x, batch_size=batch_size, steps=kwargs.get("steps"))
        return keras.Model.predict(self, x, batch_size, **kwargs)

    def train_on_batch(self, x, y=None, sample_weight=None, **kwargs):
        """One step of training, as `keras.Model.train_on_batch`, on text or tokenized arrays as `fit` takes them."""
        self.notice_adapters()
        self.notice_coarse_weights()
        batch = keras.utils.unpack_x_y_sample_weight(self.preprocess_samples(x, y, sample_weight))
        return keras.Model.train_on_batch(self, *batch, **kwargs)

    def test_on_batch(self, x, y=None, sample_weight=None, **kwargs):
        """Loss and metrics of one batch, as `keras.Model.test_on_batch`, on what `train_on_batch` takes."""
        self.notice_adapters()
        batch = keras.utils.unpack_x_y_sample_weight(self.preprocess_samples(x, y, sample_weight))
        return keras.Model.test_on_batch(self, *batch, **kwargs)

    def perplexity(self, texts, stride=None, *, verbose: Any = "auto") -> Any:
        """How surprised the model is by given texts: `exp` of the mean negative log-probability of their tokens.

        Of texts all tokens count but `<bos>`; of prompts with responses those of the responses alone; of conversations
        what the model says. The `<eos>` that training puts behind a text does not count here: a text may go on. Texts
        do not influence one another, of whatever length they are, and the logits of few tokens are made at a time.

        A text that is longer than the model's context is read in windows of that length, each `stride` tokens behind
        the one before. A token counts in the first window that has it, and so sees at least the context less the stride
        before it; each window begins with `<bos>`, if the text does (without a preprocessor, with its own token).

        Args:
            texts: a string, a list of them, or prompts with responses, conversations or records of them, as
                `Gemma2CausalLMPreprocessor` takes them; without a preprocessor, `{"token_ids": (B, L), "padding_mask":
                (B, L)}`, a text in each row.
            stride: tokens from one window to the next, at most the context; `None` is half of it. A smaller one shows
                each token more of the text, and takes longer.
            verbose: 1 shows a progress bar, 0 none; `"auto"` shows one for more tokens than are run at once.

        Returns:
            A float for one text, an (N,) float64 array for a list.

        Raises:
            InputError: if there is no text, one has nothing that counts, or an argument is outside what is allowed.

        Example:

        >>> model = Gemma2CausalLM.from_preset("gemma2_tiny_en")
        >>> sense, nonsense = model.perplexity(["The cat sat on the mat.", "Mat the on sat cat the."])
        >>> bool(sense < nonsense)
        True

        Source: windows, https://huggingface.co/docs/transformers/perplexity.
        """
        check_verbose(verbose)
        if self.preprocessor is None:
            check_token_inputs(texts, self.backbone.config.vocabulary_size)
            examples, single, start_token_id = examples_of_tokens(texts), False, None
        else:
            examples, single = examples_of_text(self.preprocessor, texts)
            start_token_id = self.preprocessor.tokenizer.start_token_id
        found = perplexities(self.programs, examples, start_token_id, stride, verbose)
        return float(found[0]) if single else found

    def score(
        self, token_ids, padding_mask=None, scoring_mode="logits", layer_intercept_fn=None, target_ids=None
    ) -> Any:
        """Logits or losses of given tokens, with a look into every layer.

        Args:
            token_ids: (B, T) int tokens.
            padding_mask: (B, T), whose numbers tell packed examples apart; all true by default.
            scoring_mode: `"logits"`, or `"loss"` for the cross-entropy of `target_ids`.
            layer_intercept_fn: called as `fn(x, i)` with the (B, T, D) scaled embeddings and i = -1, then with each
                decoder block's output and i = 0, 1, …; what it returns takes the place of `x`.
            target_ids: (B, T) int labels, for `"loss"`.

        Returns:
            (B, T, V) float32 logits, or (B, T) float32 losses.

        Raises:
            InputError: if `scoring_mode` is another, `"loss"` has no targets, or the ids are not what they should be.
        """
        if scoring_mode not in ("logits", "loss"):
            raise InputError(f'`scoring_mode` must be "logits" or "loss"; given {scoring_mode!r}.')
        if scoring_mode == "loss" and target_ids is None:
            raise InputError('`scoring_mode="loss"` needs `target_ids`, the labels to compute the loss against.')
        token_ids = ops.convert_to_tensor(token_ids)
        padding_mask = ops.ones_like(token_ids) if padding_mask is None else ops.convert_to_tensor(padding_mask)
        check_token_inputs({"token_ids": token_ids, "padding_mask": padding_mask}, self.backbone.config.vocabulary_size)
        if target_ids is not None:
            if np.shape(target_ids) != tuple(token_ids.shape):
                raise InputError(
                    f"`target_ids` must have the shape of `token_ids`, {tuple(token_ids.shape)}; "
                    f"given {np.shape(target_ids)}."
                )
            if not is_traced(target_ids):
                check_ids(ops.convert_to_numpy(target_ids), self.backbone.config.vocabulary_size, "target_ids")
        intercept = layer_intercept_fn or (lambda x, i: x)
        context = self.backbone.sequence_context(padding_mask)
        x = intercept(self.backbone.token_embedding(token_ids), -1)
        for i, layer in enumerate(self.backbone.transformer_layers):
            x = intercept(layer(x, context=context), i)
        logits = self.backbone.token_embedding(self.backbone.layer_norm(x), reverse=True)
        if scoring_mode == "logits":
            return logits
        return keras.losses.sparse_categorical_crossentropy(target_ids, logits, from_logits=True)
