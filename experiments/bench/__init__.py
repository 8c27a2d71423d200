"""What the hand-written backwards cost, layer by layer and model by model, beside what users would pick instead."""
