"""What all tests share."""

import torch

torch.set_num_threads(1)  # the tests' tensors are tiny, and threads would only wait for each other
