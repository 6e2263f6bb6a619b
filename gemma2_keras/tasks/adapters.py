"""The adapters of a task: added, chosen, merged, saved and loaded."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from gemma2_keras.checkpoints.adapters import read_adapter, write_adapter
from gemma2_keras.checkpoints.names import projections
from gemma2_keras.layers.linear import DEFAULT_ADAPTER

if TYPE_CHECKING:
    # What a task is otherwise, which this class stands in front of.
    from gemma2_keras.tasks.token_training import TokenTraining as _Task
else:
    _Task = object


class AdapterTask(_Task):
    """The part of a task that deals in adapters; its backbone holds them.

    After a change, what was traced before is traced anew, and the optimizer starts anew if other weights are trainable
    than before. A change made on the backbone itself is noticed by `fit`, `evaluate`, `predict` and `generate`.
    """

    backbone: Any

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters held, in the order in which they came."""
        return self.backbone.adapters

    @property
    def active_adapter(self) -> str | None:
        """Name of the adapter in effect, merged or not; `None` if there is none."""
        return self.backbone.active_adapter

    def enable_lora(
        self,
        rank,
        targets=None,
        alpha=None,
        dropout=0.0,
        *,
        use_rslora=False,
        use_dora=False,
        name=DEFAULT_ADAPTER,
    ) -> None:
        """Freeze the model and add trainable low-rank adapters, by default to `q_proj` and `v_proj` of every layer.

        Args:
            rank: width of each adapter.
            targets: names of projections, `"all-linear"`, or patterns of the names that modules have in a checkpoint,
                such as `"layers.[0-3].*.q_proj"`, as file names are matched; `None` is `q_proj` and `v_proj`.
            alpha: adapters' outputs are multiplied by `alpha / rank`; `None` is `rank`.
            dropout: rate on the adapters' inputs, in training.
            use_rslora: whether to multiply by `alpha / sqrt(rank)` instead.
            use_dora: whether the rows of the adapted weights get trainable lengths. Their lengths are computed anew in
                each step, which costs another look at the weights: merge such an adapter before it generates much.
            name: of the adapter, of letters, digits, `_` and `-`. It is the one in effect from now on.

        Raises:
            ValueError: as `Gemma2Backbone.enable_lora`; the model is then as it was.

        Example:

        >>> model = Gemma2CausalLM.from_preset("gemma2_tiny_en")
        >>> model.enable_lora(rank=4)
        >>> {v.path.split("/")[-1] for v in model.trainable_variables} == {"lora_a", "lora_b"}
        True
        """
        self.backbone.enable_lora(rank, targets, alpha, dropout, use_rslora=use_rslora, use_dora=use_dora, name=name)
        self.notice_adapters()

    def set_adapter(self, name: str) -> None:
        """Let another adapter be the one in effect, and the one that is trained.

        Raises:
            ValueError: if there is no adapter of this name, or one is merged.
        """
        self.backbone.set_adapter(name)
        self.notice_adapters()

    def disable_adapter(self) -> contextlib.AbstractContextManager:
        """Compute without adapters until `enable_adapter` or `set_adapter`, or to the end of a `with`.

        Raises:
            ValueError: if an adapter is merged.

        Example:

        >>> model = Gemma2CausalLM.from_preset("gemma2_tiny_en")
        >>> model.enable_lora(rank=4)
        >>> with model.disable_adapter():
        ...     print(model.active_adapter)
        None
        >>> model.active_adapter
        'default'
        """
        before = self.active_adapter
        self.backbone.disable_adapter()
        self.notice_adapters()
        end = contextlib.ExitStack()
        if before is not None:
            end.callback(self.enable_adapter)
        return end

    def enable_adapter(self) -> None:
        """Bring the adapter that `disable_adapter` disabled into effect again."""
        self.backbone.enable_adapter()
        self.notice_adapters()

    def merge_adapter(self) -> None:
        """Fold the adapter in effect into the weights, so that it costs no time.

        The weights as they were are kept in the host's memory, for `unmerge_adapter`; `unload_adapter` frees them and
        leaves the merged ones.

        Raises:
            ValueError: if no adapter is in effect, or it is merged already.
        """
        self.backbone.merge_adapter()
        self.notice_adapters()

    def unmerge_adapter(self) -> None:
        """Bring back the weights, bit for bit, as they were before `merge_adapter`.

        Raises:
            ValueError: if no adapter is merged.
        """
        self.backbone.unmerge_adapter()
        self.notice_adapters()

    def unload_adapter(self, name: str | None = None) -> None:
        """Forget an adapter, or all; what is merged stays in the weights.

        Once the last one is gone the whole model is trainable.

        Args:
            name: of the adapter; `None` is all of them.

        Raises:
            ValueError: if there is no adapter of this name.
        """
        self.backbone.remove_adapter(name)
        self.notice_adapters()

    def save_adapter(self, folder: str | os.PathLike, name: str | None = None) -> None:
        """Write an adapter alone, in the format of PEFT: `peft.PeftModel.from_pretrained` loads it on transformers.

        Args:
            folder: where. An adapter saved there before is replaced, and stays as it was if writing fails.
            name: of the adapter; `None` is the one last chosen.

        Raises:
            ValueError: if there is no such adapter.
            FileExistsError: if something else than a saved adapter stands there.
        """
        write_adapter(folder, self.backbone, self.backbone.selected_adapter if name is None else name)

    def load_adapter(self, folder: str | os.PathLike, name: str = DEFAULT_ADAPTER, *, trainable: bool = False) -> None:
        """Add an adapter that `save_adapter` or PEFT wrote; it is the one in effect from now on.

        Args:
            folder: holds `adapter_config.json` and `adapter_model.safetensors`.
            name: of the adapter, of letters, digits, `_` and `-`.
            trainable: whether its weights are trainable; the others are frozen in any case.

        Raises:
            CheckpointError: if the files are broken, do not fit the model, or ask for what is not implemented; the
                message names the file and the key. The model is then as it was.
            ValueError: if the name cannot be, there is an adapter of this name, or one is merged.

        Example:

        >>> import tempfile
        >>> model = Gemma2CausalLM.from_preset("gemma2_tiny_en")
        >>> model.enable_lora(rank=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_adapter(f"{folder}/mine")
        ...     model.load_adapter(f"{folder}/mine", name="again")
        >>> model.adapters
        ['default', 'again']
        """
        read_adapter(folder, projections(self.backbone.config)).add_to(self.backbone, name, trainable)
        self.notice_adapters()

    def remember_adapters(self) -> None:
        """Take the adapters as they are for those that programs and optimizer know."""
        self._adapters_known = self.backbone.adapter_changes, self.backbone.training_changes

    def notice_adapters(self) -> None:
        """Start anew, if adapters have changed, what was traced or built before."""
        changed, trained = self._adapters_known
        self.remember_adapters()
        if changed == self.backbone.adapter_changes:
            return
        self.train_function = self.test_function = self.predict_function = None
        self.forget_programs()
        if (
            trained != self.backbone.training_changes
            and self.compiled
            and self.optimizer is not None
            and self.optimizer.built
        ):
            self.optimizer = self.optimizer.from_config(self.optimizer.get_config())

    def make_train_function(self, force: bool = False) -> Any:
        """As `keras.Model` has it, unless the adapter to train has no effect."""
        if self.adapters and (self.active_adapter is None or self.backbone.is_merged):
            raise ValueError(
                f"Adapter {self.backbone.selected_adapter!r} is merged or disabled, so that nothing would be trained: "
                "call `unmerge_adapter()`, `set_adapter(name)` or `unload_adapter()` first."
            )
        if self.adapters and not self.trainable_variables:
            raise ValueError("No adapter is there to train: give `load_adapter` `trainable=True`, or `enable_lora`.")
        # Dropout would draw another mask, or none, when a branch is computed again.
        specs = [] if self.active_adapter is None else self.backbone.adapter_specs(self.active_adapter).values()
        if self.remat and any(spec.dropout for spec in specs):
            raise ValueError(
                "`remat=True` and adapters with dropout do not go together: compile with `remat=False`, or add the "
                "adapter with `dropout=0.0`."
            )
        return super().make_train_function(force)
