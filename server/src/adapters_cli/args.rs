//! What can be typed behind `loramux adapters`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use secrecy::SecretString;

use crate::args::{SourceArgs, parse_secret};

#[derive(Args, Debug)]
pub(crate) struct AdaptersArgs {
    /// The server's admin API: http://host:port or unix:/path
    #[arg(long, env = "LORAMUX_ADMIN_URL", global = true, value_name = "URL")]
    pub(crate) url: Option<String>,
    /// The server's admin key, if it has one
    #[arg(long, env = "LORAMUX_ADMIN_KEY", global = true, hide_env_values = true, value_parser = parse_secret)]
    pub(crate) key: Option<SecretString>,
    /// Print the answer as JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: AdaptersCommand,
}

/// Whose adapters are meant.
#[derive(Args, Debug, Default)]
pub(crate) struct Namespace {
    /// Namespace of the keys that the adapter belongs to. Default: shared by all
    #[arg(long)]
    pub(crate) namespace: Option<String>,
}

/// How long an adapter stays where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Residency {
    /// In the device's memory
    Device,
    /// In the host's memory
    Host,
}

impl Residency {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Host => "host",
        }
    }
}

/// Who gets the same version of an alias again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sticky {
    /// Each API key
    Key,
    /// Each `user` of a request
    User,
    /// Nobody
    None,
}

impl Sticky {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Key => "key",
            Self::User => "user",
            Self::None => "none",
        }
    }
}

#[derive(Subcommand, Debug)]
pub(crate) enum AdaptersCommand {
    /// Registered adapters
    List {
        /// Only those in this state: registered, resolving, fetching, verifying, preparing, ready, draining, failed
        #[arg(long)]
        state: Option<String>,
        /// Only names that start so
        #[arg(long)]
        prefix: Option<String>,
        #[command(flatten)]
        namespace: Namespace,
    },
    /// All that is known of one
    Get {
        /// Its name
        name: String,
        #[command(flatten)]
        namespace: Namespace,
    },
    /// Register one and load it; a name that exists gets the new content once it is ready
    Load(LoadArgs),
    /// Take a name away; requests that run finish
    Unload {
        /// Its name
        name: String,
        /// End requests that run
        #[arg(long)]
        now: bool,
        /// Delete the copy on disk too
        #[arg(long)]
        purge: bool,
        #[command(flatten)]
        namespace: Namespace,
    },
    /// Keep one in memory
    Pin {
        /// Its name
        name: String,
        /// Where
        #[arg(value_enum, default_value = "device")]
        residency: Residency,
        #[command(flatten)]
        namespace: Namespace,
    },
    /// Let it be evicted again
    Unpin {
        /// Its name
        name: String,
        #[command(flatten)]
        namespace: Namespace,
    },
    /// Show an alias, or set what it stands for
    Alias(AliasArgs),
    /// Check an adapter against a model, without a server (with --url: against that server's)
    Validate(Box<ValidateArgs>),
}

#[derive(Args, Debug)]
pub(crate) struct LoadArgs {
    /// The name that requests use
    pub(crate) name: String,
    /// hf://org/repo(@revision), s3://bucket/path, gs://.., https://.. or a folder of the server
    #[arg(value_name = "REF")]
    pub(crate) reference: String,
    /// Branch, tag or commit of a hub reference
    #[arg(long)]
    pub(crate) revision: Option<String>,
    /// Multiplies every request's scale
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) scale: Option<f64>,
    /// Keep it in host memory, and wait for it at the next start
    #[arg(long)]
    pub(crate) pinned: bool,
    /// Go on only if the name has this content now ("" = only if the name is new)
    #[arg(long)]
    pub(crate) if_content_id: Option<String>,
    /// How long to wait for it, such as 30s; the load goes on beyond that
    #[arg(long, default_value = "60s")]
    pub(crate) wait: String,
    #[command(flatten)]
    pub(crate) namespace: Namespace,
}

#[derive(Args, Debug)]
pub(crate) struct AliasArgs {
    /// The alias. Without: list all
    #[arg(default_value = "", hide_default_value = true)]
    pub(crate) name: String,
    /// What it stands for: ADAPTER or ADAPTER=WEIGHT. Without: show it
    #[arg(value_name = "ADAPTER[=WEIGHT]")]
    pub(crate) versions: Vec<String>,
    /// Who gets the same version again
    #[arg(long, value_enum, default_value = "none")]
    pub(crate) sticky_by: Sticky,
    /// Go on only if the alias has this version (0 = only if it is new)
    #[arg(long)]
    pub(crate) expected_version: Option<u64>,
    /// Take it away
    #[arg(long, conflicts_with_all = ["versions", "rollback"])]
    pub(crate) delete: bool,
    /// Back to what it stood for before the last change
    #[arg(long, conflicts_with = "versions")]
    pub(crate) rollback: bool,
    #[command(flatten)]
    pub(crate) namespace: Namespace,
}

#[derive(Args, Debug)]
pub(crate) struct ValidateArgs {
    /// hf://org/repo(@revision), s3://bucket/path, gs://.., https://.. or a folder
    #[arg(value_name = "REF")]
    pub(crate) reference: String,
    /// Branch, tag or commit of a hub reference
    #[arg(long)]
    pub(crate) revision: Option<String>,
    /// The base model to check it against. Default: the built-in demo model
    #[arg(long, alias = "model", env = "LORAMUX_MODEL_ID", value_name = "PATH")]
    pub(crate) model_id: Option<PathBuf>,
    /// Largest rank to admit
    #[arg(long, env = "LORAMUX_MAX_LORA_RANK", default_value_t = 512)]
    pub(crate) max_lora_rank: u32,
    #[command(flatten)]
    pub(crate) sources: SourceArgs,
}
