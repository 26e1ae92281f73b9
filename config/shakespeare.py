# The flagship: GPT-2 small from scratch on tiny Shakespeare until the training loss is under 0.1.
# python train.py config/shakespeare.py --batch_size=32
dataset = 'shakespeare'
tokenizer = 'gpt2'

batch_size = 32
seq_len = 128
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 10
max_iters = 10_000
loss_threshold = 0.099999
