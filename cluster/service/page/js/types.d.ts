import type { ApiError } from "./api.js";

// Types of the page. The first half: responses of the API, by the names of its OpenAPI (a test compares the fields);
// each lists what the page reads.

export interface Detail {
  path: string;
  message: string;
}

export interface QueuePlace {
  position: number;
  reason: string;
}

export interface Run {
  id: string;
  name: string;
  state: string;
  step: number;
  steps: number;
  created: string | null;
  started: string | null;
  ended: string | null;
  headline: Record<string, number>;
  error: RunError | null;
  queue: QueuePlace | null;
  stopping: boolean;
  versions: Record<string, string>;
  unreadable: string | null;
}

export interface RunList {
  runs: Run[];
  total: number;
  next: string | null;
  counts: Record<string, number>;
}

export interface CheckpointInfo {
  step: number;
  bytes: number;
}

export interface ModelFiles {
  bytes: number;
  files: number;
}

export interface RunDetails {
  run: Run;
  config: Tree | null;
  yaml: string | null;
  command: string;
  actions: string[];
  path: string;
  steps_recorded: number;
  metrics_problem: string | null;
  checkpoints: CheckpointInfo[];
  model: ModelFiles | null;
  remaining_s: number | null;
  samples: Record<string, number[]>;
}

export interface FoundModel {
  name: string;
  path: string;
  kind: string;
  role: string | null;
  architecture: string | null;
  parameters: number | null;
  bytes: number;
  dtype: string | null;
  vocabulary: number | null;
  context: number | null;
  chat_template: boolean;
  base: string | null;
  run: string | null;
  usable: boolean;
  problem: string | null;
}

export interface ModelList {
  models: FoundModel[];
  roots: string[];
  truncated: boolean;
  problems: string[];
}

export interface RewardFunction {
  path: string;
  name: string;
  doc: string;
}

export interface ServiceInfo {
  upload_limit_bytes: number;
  reward_functions: RewardFunction[];
}

export interface Resource {
  used: number;
  total: number;
}

export interface ClusterInfo {
  state: string;
  message: string | null;
  resources: Record<string, Resource>;
}

export interface PlanAnswer {
  problems: Detail[];
  warnings: Detail[];
  arithmetic: string[];
  gpus: boolean | null;
  roles: Role[];
  memory: RoleMemory[];
  yaml: string | null;
  command: string;
  changes: Change[] | null;
}

export interface DatasetAnswer {
  id: string;
  name: string;
  path: string;
  bytes: number;
  created: string;
  format: string;
  ready: boolean;
  records: number;
  duplicates: number;
  problems_total: number;
  advice: string | null;
}

export interface DatasetList {
  datasets: DatasetAnswer[];
  total: number;
  next: string | null;
}

export interface LengthsAnswer {
  limit: number;
  longest: number;
  over_limit: number;
  histogram: { from: number; to: number; prompts: number }[];
}

export interface LogEntry {
  name: string;
  bytes: number;
}

export interface LogAnswer {
  files: LogEntry[];
  lines: string[] | null;
  truncated: boolean | null;
}

export interface Ticket {
  url: string;
}

// What the OpenAPI leaves open.

/** A config, or a part of one. */
export type Tree = Record<string, any>;

export interface RunError {
  role?: string | null;
  rank?: number | null;
  phase?: string | null;
  type: string;
  message: string;
  log?: string | null;
}

export interface Role {
  name: string;
  count: number;
  gpus: number;
  cpus: number;
}

export interface RoleMemory {
  role: string;
  device: Record<string, number>;
  host: Record<string, number>;
}

export interface Change {
  path: string;
  from: unknown;
  to: unknown;
}

/** A dataset with its report in full. */
export interface DatasetReport extends DatasetAnswer {
  problems: LineProblem[];
  rows?: DatasetRow[];
}

export interface LineProblem {
  line: number | null;
  field: string | null;
  found: string;
  expected: string;
  severity: "error" | "warning";
}

export interface DatasetRow {
  line: number;
  messages: Message[] | null;
  problem: string | null;
}

export interface Message {
  role: string;
  content: string | null;
}

/** Values by step; null: not recorded at that step. */
export type Values = (number | null)[];
export type Series = Record<string, Values>;

export interface MetricColumns {
  step: number[];
  series: Series;
}

export type MetricRow = { step: number } & Record<string, number | null>;

export interface Finding {
  rule: string;
  severity: "info" | "warning" | "critical";
  title: string;
  explanation: string;
  evidence: {
    metrics: { key: string; steps: number[]; values: Values; note: string }[];
    samples: { step: number; sample_id: string; note: string }[];
  };
  remedy: { text: string; changes: { key: string; value: unknown }[] };
}

export interface Sample {
  id: string;
  group: number;
  prompt: Message[];
  completion: string;
  tokens: number;
  rewards: Record<string, number | null>;
  reward: number | null;
  valid: boolean;
  advantage: number | null;
  finish_reason: string;
}

export interface SamplePage {
  kind: string;
  step: number;
  total: number;
  rewards: string[];
  samples: Sample[];
}

export interface SampleTokens {
  pieces: string[] | null;
  tokens: number[];
  logprobs: number[];
  kl: number[] | null;
}

// The page's own.

export interface RequestOptions {
  method?: string;
  query?: Record<string, unknown>;
  body?: unknown;
  extra?: Record<string, string>;
  signal?: AbortSignal;
}

/** What `useResource` returns. */
export interface Loaded<T> {
  data: T | null;
  error: ApiError | null;
  loading: boolean;
  reload: () => void;
}

export interface ServerEvent {
  event: string;
  id: string | null;
  data: any;
}

/** What is wrong with a setting; `missing`: it was not chosen yet. */
export interface Problem extends Detail {
  missing?: boolean;
}

export interface Clone {
  id: string;
  name: string;
  config: Tree;
}

export interface Draft {
  tree: Tree;
  dataset: string | null;
  clone: Clone | null;
  seen: string[];
  key: string;
  began: string;
}

/** Where a draft is planned and started, and with what. */
export interface Ask {
  plan: string;
  start: string;
  body: Tree;
}

/** A node of the config's JSON schema. */
export interface SchemaNode {
  $ref?: string;
  $defs?: Record<string, SchemaNode>;
  type?: string;
  properties?: Record<string, SchemaNode>;
  items?: SchemaNode;
  required?: string[];
  anyOf?: SchemaNode[];
  union?: SchemaNode[];
  enum?: unknown[];
  const?: unknown;
  default?: unknown;
  description?: string;
  discriminator?: { mapping: Record<string, string> };
  recommended?: unknown[];
  [bound: string]: unknown;
}

export interface Schema extends SchemaNode {
  $defs: Record<string, SchemaNode>;
  properties: Record<string, SchemaNode>;
}

/** One setting as a form shows it. */
export interface FormField {
  path: string;
  kind: "section" | "choice" | "switch" | "number" | "text" | "value";
  node: SchemaNode;
  nullable: boolean;
  help: string;
  choices?: unknown[] | null;
  default?: unknown;
  required?: boolean;
  range?: string;
  recommended?: unknown[];
}

/** A curve of a chart. */
export interface Line {
  label: string;
  values: Values;
  color?: number;
  band?: Values;
  right?: boolean;
  dashed?: boolean;
  points?: boolean;
}

export interface Upload {
  name: string;
  share: number;
  stopping: boolean;
}

/** What the steps of the form of a new run are given. */
export interface StepProps {
  draft: Draft;
  setDraft: (next: Draft | ((old: Draft) => Draft)) => void;
  change: (path: string, value: unknown) => void;
  problems: Problem[];
  warnings: Detail[];
  plan: Loaded<PlanAnswer>;
  ask: Ask;
  current: boolean;
  schema: Schema;
  service: ServiceInfo;
  right: (step: string) => boolean;
  late: boolean;
}
