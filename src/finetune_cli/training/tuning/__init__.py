"""Fine-tuning: the upper part of a backbone learns together with the head, and the result is kept only if it is better.

The lower part stays frozen, so what it gives for a view (the activations at the cut) is computed once. `stage.run` is
the way in: a prepared training and its fitted head go in, a backbone, its features and a head come out.
"""
