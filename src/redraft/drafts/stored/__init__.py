"""What kinds of draft share about checkpoint folders: the layer's keys and tensors, engines, second readings."""
