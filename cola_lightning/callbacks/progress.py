"""The bar that one watches."""

from lightning.pytorch.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """Lightning's bar, over the steps of the whole run; by itself it would speak of epochs."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{'Training':{len(self.validation_description)}}"  # as wide as validation's, or the bar flickers
