"""Files on the disk: written whole or not at all, by one writer at a time, and read safely whoever wrote them."""
