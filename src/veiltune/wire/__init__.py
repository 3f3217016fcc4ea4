"""What crosses between customer and vendor: protobuf frames of raw little-endian tensors, checked at the door."""
