# SPDX-License-Identifier: MIT
#
# peer.py PID VMCOREINFO GPA SIZE HVA...: what drgn takes to come to the same
# about the guest of the VMM with this pid, which has SIZE bytes of the guest's
# memory from GPA on at HVA: release, a symbol, a type, modules' as well, then
# its tasks. It writes one object of JSON.

import json
import os
import sys
import time

start = time.perf_counter()
import drgn
from drgn.helpers.linux.pid import for_each_task

loaded = time.perf_counter()
memory = os.open(f"/proc/{sys.argv[1]}/mem", os.O_RDONLY)
prog = drgn.Program(drgn.host_platform)
numbers = [int(a) for a in sys.argv[3:]]
for gpa, size, hva in zip(*[iter(numbers)] * 3):

    def read(address, count, offset, physical, hva=hva):
        return os.pread(memory, count, hva + offset)

    prog.add_memory_segment(gpa, size, read, True)
with open(sys.argv[2], "rb") as f:
    prog.set_linux_kernel_custom(f.read(), True)
prog.load_default_debug_info()
release = prog["init_uts_ns"].name.release.string_().decode()
symbol = prog.symbol("vfs_read").address
offset = drgn.offsetof(prog.type("struct task_struct"), "pid")
attached = time.perf_counter()
tasks = sum(1 for _ in for_each_task(prog))
listed = time.perf_counter()
modules = [m.name for m in prog.modules() if isinstance(m, drgn.RelocatableModule)]
without = [m.name for m in prog.modules() if m.wants_debug_file()]
json.dump(
    {
        "version": drgn.__version__,
        "release": release,
        "vfs_read": symbol,
        "pid": offset,
        "tasks": tasks,
        "modules": modules,
        "without": without,
        "load_s": loaded - start,
        "attach_s": attached - loaded,
        "tasks_s": listed - attached,
    },
    sys.stdout,
)
