"""What a compile did to every attention, why, what it costs and what it gains."""
