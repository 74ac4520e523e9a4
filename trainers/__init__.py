"""Mathematics and data of online RLHF, pure: tensors in, tensors out; it knows no Ray, no engine and no network."""
