import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { describe, it } from 'node:test';
import { cpuSeconds, idleThreadSeconds, ProcessMeter } from '../../../src/bench/process-use.ts';
import { waitFor } from '../../support/containerd.ts';

describe('what processes consume', () => {
  it('tells the time of threads that get only what nobody else wants', async () => {
    const child = spawn('chrt', ['--idle', '0', 'sh', '-c', 'while :; do :; done'], { stdio: 'ignore' });
    try {
      const pid = child.pid!;
      const meter = new ProcessMeter([{ name: 'idle', pid }]);
      await waitFor('an idle thread to get time', () => idleThreadSeconds(pid) > 0.02, 60_000);
      const [idle] = meter.use();
      assert.ok(idle!.idleCpuSeconds! > 0 && idle!.idleCpuSeconds! <= idle!.cpuSeconds + 0.02);
      assert.ok(cpuSeconds(process.pid) > 0);
      assert.equal(idleThreadSeconds(process.pid), 0);
    } finally {
      child.kill('SIGKILL');
    }
  });
});
