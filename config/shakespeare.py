# The flagship: GPT-2 small from scratch on tiny Shakespeare until the training loss is under 0.1.
# It learns the text by heart. The validation loss is best in the first few epochs: out/best.pt.
# python train.py config/shakespeare.py --batch_size=32
dataset = 'shakespeare'
tokenizer = 'gpt2'
shift_windows = False  # the same windows in every epoch are learnt by heart sooner

batch_size = 32
seq_len = 128

optimizer = 'muon'
learning_rate = 2e-3
schedule = 'linear'
min_lr = 2e-4
warmup_iters = 20
weight_decay = 0.0
max_iters = 3000
loss_threshold = 0.099999

eval_interval = 100
