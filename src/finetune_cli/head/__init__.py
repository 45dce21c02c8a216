"""The softmax head: L-BFGS in SciPy, Adam and SGD in Keras, the choice of l2."""
