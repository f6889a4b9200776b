// The programs a benchmark runs on the node under test: containerd's ctr and what pulls an image. Everything is measured
// from the outside, with the commands an operator would type.
import { type ChildProcess, type ExecFileException, execFile, spawn } from 'node:child_process';
import { DedupError } from '../errors.ts';

/** The node under test. */
export interface BenchNode {
  /** Put before every program that talks to a registry, e.g. ['nsenter', '--net=…']; empty: this network. */
  readonly inside: readonly string[];
  /** containerd's socket. */
  readonly address: string;
  /** containerd's namespace, used by nobody else. */
  readonly namespace: string;
}

export interface ExecuteOptions {
  /** Default: ten minutes. */
  readonly timeoutMs?: number;
  /** Answers with what it printed instead of throwing. */
  readonly allowFailure?: boolean;
}

const MAX_OUTPUT_BYTES = 64 * 1024 * 1024;

/** Runs a program to its end and answers its standard output. Errors: UNAVAILABLE with all it printed. */
export async function execute(argv: readonly string[], options: ExecuteOptions = {}): Promise<string> {
  const [file = '', ...args] = argv;
  return await new Promise((resolve, reject) => {
    execFile(
      file,
      args,
      { timeout: options.timeoutMs ?? 600_000, killSignal: 'SIGKILL', maxBuffer: MAX_OUTPUT_BYTES },
      (error, stdout, stderr) => {
        if (error === null || options.allowFailure === true) resolve(stdout);
        else reject(commandError(argv, error, `${stdout}${stderr}`));
      },
    );
  });
}

function commandError(argv: readonly string[], error: ExecFileException, output: string): DedupError {
  if (error.code === 'ENOENT') {
    return new DedupError('UNAVAILABLE', `${argv[0]} was not found`, {
      cause: error,
      hint: `install it, or add it to PATH`,
    });
  }
  return new DedupError('UNAVAILABLE', `${argv.join(' ')}: ${output.trim() || error.message}`, { cause: error });
}

/** `ctr` with the node's socket and namespace, ready for a command. */
export function ctr(node: BenchNode, ...args: readonly string[]): string[] {
  return [...node.inside, 'ctr', '--address', node.address, '--namespace', node.namespace, ...args];
}

/** Starts a program whose output is read as it comes. Its input is empty. */
export function launch(argv: readonly string[]): ChildProcess {
  const [file = '', ...args] = argv;
  return spawn(file, args, { stdio: ['ignore', 'pipe', 'pipe'] });
}

/** Splits a command line at white space; parts in quotes stay whole. Errors: INVALID_ARGUMENT at an open quote. */
export function splitCommand(text: string): string[] {
  const words: string[] = [];
  const pattern = /\s*((?:[^\s"']+|"[^"]*"|'[^']*')+)/y;
  let end = 0;
  for (let match = pattern.exec(text); match !== null; match = pattern.exec(text)) {
    end = pattern.lastIndex;
    words.push(match[1]!.replace(/"([^"]*)"|'([^']*)'/g, (_whole, double: string, single: string) => double ?? single));
  }
  if (text.slice(end).trim() === '') return words;
  throw new DedupError('INVALID_ARGUMENT', `a quote is left open in ${JSON.stringify(text)}`);
}
