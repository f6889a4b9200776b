// Finds and loads the .proto files for the gRPC servers and clients of every process.
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { type GrpcObject, loadPackageDefinition } from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';
import { DedupError } from './errors.ts';

/** Compared by Hello; raised with every change that an older peer would misunderstand. */
export const DEDUPD_PROTOCOL = 1;

function locate(name: string): string {
  for (let directory = dirname(fileURLToPath(import.meta.url)); ; directory = dirname(directory)) {
    const file = join(directory, 'proto', name);
    if (existsSync(file)) return file;
    if (directory === dirname(directory))
      throw new DedupError('INTERNAL', `proto/${name} is missing beside the program`);
  }
}

/** The packages of `proto/<name>`. Names of fields stay as written, int64 become numbers, enums numbers. */
export function loadProto(name: string): GrpcObject {
  return loadPackageDefinition(
    loadSync(locate(name), {
      keepCase: true,
      longs: Number,
      enums: Number,
      defaults: true,
      arrays: true,
      objects: true,
      includeDirs: [dirname(locate(name))],
    }),
  );
}
