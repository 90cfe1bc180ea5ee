"""Private parts: the tensors trained for one target beside a frozen shared draft."""
