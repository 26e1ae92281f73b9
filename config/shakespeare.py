# The flagship: GPT-2 small from scratch on tiny Shakespeare until the training loss is under 0.1.
# It learns its windows of the text by heart. The validation loss is best in the third epoch: out/best.pt.
# python train.py config/shakespeare.py --batch_size=32
dataset = 'shakespeare'
tokenizer = 'gpt2'
shift_windows = False  # the same windows in every epoch are learnt by heart sooner

batch_size = 32
seq_len = 128

optimizer = 'muon'
learning_rate = 5e-3  # the best of 2e-3, 5e-3, 1e-2 and 2e-2 for a 6 x 256 model on an eighth of the text
schedule = 'linear'   # to 0 soon after the threshold
min_lr = 0.0
warmup_iters = 20
weight_decay = 0.0
max_iters = 640  # 8.8 epochs, 2.6 million tokens
loss_threshold = 0.099999

eval_interval = 100
