# For Cython's include path, where the package itself is not at hand: this folder holds what it declares.
