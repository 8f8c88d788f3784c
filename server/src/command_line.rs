//! The command line around `args.rs`: flags and variables that other servers use, and the file of settings.
//!
//! What a variable of another server or the file says becomes the default of our own flag, so the order is: flag,
//! `LORAMUX_*`, other server's variable, file, default.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, CommandFactory, FromArgMatches};
use serde_json::{Map, Value};

use crate::args::{self, Cli};
use crate::config::Env;
use crate::foreign_flags::{FLAGS, Flag, Meaning, VARIABLES};

/// Values of our flags by their ids, where nobody typed one.
type Defaults = BTreeMap<String, Vec<String>>;

/// Reads what was typed. Prints help, version or the mistake and ends the process where one of these is due.
pub(crate) fn parse(env: &Env) -> Cli {
    read(std::env::args_os().collect(), env).unwrap_or_else(|error| error.exit())
}

/// The same of `typed`, program name included.
pub(crate) fn read(typed: Vec<OsString>, env: &Env) -> Result<Cli, clap::Error> {
    let plain = command(&Defaults::new());
    let mut matches = plain.clone().try_get_matches_from(&typed)?;
    let mut defaults = Defaults::new();
    if let Some(path) = serve_matches(&matches).and_then(|serve| serve.get_one::<PathBuf>("config")) {
        let mut command = plain.clone();
        let wrong =
            |what: String| command.error(ErrorKind::ValueValidation, format!("--config {}: {what}", path.display()));
        defaults = file_settings(path, &plain).map_err(wrong)?;
    }
    for (variable, id) in VARIABLES {
        if let Some(value) = env.first(&[variable]) {
            defaults.insert((*id).to_owned(), vec![value.to_owned()]);
        }
    }
    if !defaults.is_empty() {
        matches = command(&defaults).try_get_matches_from(&typed)?;
    }
    let mut cli = Cli::from_arg_matches(&matches)?;
    let Some(typed) = serve_matches(&matches) else { return Ok(cli) };
    let serve = match &mut cli.command {
        Some(args::Command::Serve(serve)) => &mut **serve,
        _ => &mut cli.serve,
    };
    serve.notices = notices(typed, &plain)?;
    serve.settings = settings(typed, &plain);
    if let Some(switch) = prefix_caching(typed) {
        serve.engine.prefix_caching = switch;
    }
    if let Ok(Some(model)) = typed.try_get_one::<PathBuf>("model") {
        serve.model.model_id = Some(model.clone());
    }
    Ok(cli)
}

/// Where the flags of `serve` are; `None` for the other subcommands.
fn serve_matches(matches: &ArgMatches) -> Option<&ArgMatches> {
    match matches.subcommand() {
        None => Some(matches),
        Some(("serve", serve)) => Some(serve),
        Some(_) => None,
    }
}

/// Our command with the flags of other servers, hidden, and `defaults` in the places of ours.
fn command(defaults: &Defaults) -> Command {
    let with_all = |mut command: Command| {
        for flag in FLAGS {
            command = command.arg(hidden(flag));
        }
        for (id, values) in defaults {
            // Once for each process, and clap keeps defaults as long as it lives.
            let values: Vec<&'static str> = values.iter().map(|value| &*value.clone().leak()).collect();
            command = command.mut_arg(id.clone(), |arg| arg.default_values(values));
        }
        command
    };
    let model = Arg::new("model").value_parser(clap::value_parser!(PathBuf)).hide(true).conflicts_with("model_id");
    with_all(Cli::command()).mut_subcommand("serve", |serve| with_all(serve).arg(model))
}

/// A flag of another server. Its value, if it has one, may be anything.
fn hidden(flag: &Flag) -> Arg {
    let arg = Arg::new(flag.name).long(flag.name).hide(true);
    if flag.takes_value {
        arg.num_args(0..=1).default_missing_value("")
    } else {
        arg.num_args(0..=1).require_equals(true).default_missing_value("")
    }
}

/// What is said once at the start about flags that have no effect here.
fn notices(typed: &ArgMatches, command: &Command) -> Result<Vec<String>, clap::Error> {
    let mut said = Vec::new();
    for flag in FLAGS {
        if typed.value_source(flag.name) != Some(ValueSource::CommandLine) {
            continue;
        }
        let value = typed.get_one::<String>(flag.name).map_or("", String::as_str);
        let refused = |why: &str| {
            let message = format!("--{} {value}: {why}", flag.name);
            Err(command.clone().error(ErrorKind::ValueValidation, message.replace(" :", ":")))
        };
        match flag.meaning {
            Meaning::Switch => {}
            Meaning::NoEffect(why) => said.push(format!("--{} has no effect: {why}", flag.name)),
            Meaning::Only(allowed, why) if allowed.contains(&value) => {
                said.push(format!("--{} {value} has no effect: {why}", flag.name));
            }
            Meaning::Only(_, why) | Meaning::Refused(why) => return refused(why),
        }
    }
    Ok(said)
}

/// vLLM's pair of switches for what is one flag here.
fn prefix_caching(typed: &ArgMatches) -> Option<bool> {
    let is_typed = |name: &str| typed.value_source(name) == Some(ValueSource::CommandLine);
    match (is_typed("enable-prefix-caching"), is_typed("no-enable-prefix-caching")) {
        (_, true) => Some(false),
        (true, false) => Some(true),
        (false, false) => None,
    }
}

/// The file's values, by the ids of our flags.
fn file_settings(path: &Path, command: &Command) -> Result<Defaults, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let table: toml::Table = toml::from_str(&text).map_err(|error| error.message().to_owned())?;
    let mut settings = Defaults::new();
    for (key, value) in table {
        let id = key.replace('-', "_");
        let Some(arg) = our_flags(command).find(|arg| arg.get_id() == id.as_str() && id != "config") else {
            return Err(format!("`{key}` is no flag of `loramux serve`"));
        };
        let values = match value {
            toml::Value::Array(values) => values.iter().map(scalar).collect::<Option<Vec<_>>>(),
            one => scalar(&one).map(|text| vec![text]),
        };
        let values =
            values.ok_or_else(|| format!("`{key}` must be a string, a number, true, false, or a list of these"))?;
        settings.insert(arg.get_id().to_string(), values);
    }
    Ok(settings)
}

fn scalar(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        toml::Value::Boolean(set) => Some(set.to_string()),
        _ => None,
    }
}

/// The flags of `serve` that are our own.
fn our_flags(command: &Command) -> impl Iterator<Item = &Arg> {
    let ours = |arg: &&Arg| {
        let name = arg.get_id().as_str();
        !matches!(name, "help" | "version") && !FLAGS.iter().any(|flag| flag.name == name)
    };
    command.get_arguments().filter(ours)
}

/// What every flag came to, by its name. Those that are secrets are covered.
fn settings(typed: &ArgMatches, command: &Command) -> Value {
    let mut map = Map::new();
    for arg in our_flags(command) {
        let Some(name) = arg.get_long() else { continue };
        let raw = typed.try_get_raw(arg.get_id().as_str()).ok().flatten();
        let values: Vec<Value> = raw.into_iter().flatten().map(|value| shown(arg, &value.to_string_lossy())).collect();
        let many = matches!(arg.get_action(), clap::ArgAction::Append);
        let value = if many { Value::Array(values) } else { values.into_iter().next().unwrap_or(Value::Null) };
        map.insert(name.to_owned(), value);
    }
    Value::Object(map)
}

fn shown(arg: &Arg, text: &str) -> Value {
    if arg.is_hide_env_values_set() {
        return Value::String("***".into());
    }
    match serde_json::from_str(text) {
        Ok(scalar @ (Value::Bool(_) | Value::Number(_))) => scalar,
        _ => Value::String(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(flags: &[&str], variables: &[(&str, &str)]) -> Result<args::ServeArgs, String> {
        let argv = ["loramux"].iter().chain(flags).map(OsString::from).collect();
        let cli = read(argv, &Env::of(variables)).map_err(|error| error.to_string())?;
        Ok(match cli.command {
            Some(args::Command::Serve(serve)) => *serve,
            _ => cli.serve,
        })
    }

    #[test]
    fn the_command_line_with_the_flags_of_others_is_consistent() {
        command(&Defaults::new()).debug_assert();
        let ours: Vec<String> = our_flags(&command(&Defaults::new())).map(|arg| arg.get_id().to_string()).collect();
        for (variable, id) in VARIABLES {
            assert!(ours.iter().any(|known| known == id), "{variable} means {id}, which is no flag");
        }
    }

    #[test]
    fn a_flag_wins_over_a_variable_and_that_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("settings.toml");
        std::fs::write(
            &file,
            "port = 1\nmax-n = 3\nmax_stop_sequences = 7\nserved-model-name = ['a', 'b']\nprefix-caching = false\n",
        )
        .unwrap();
        let file = ["--config", file.to_str().unwrap()];
        let read = typed(&file, &[]).unwrap();
        assert_eq!((read.network.port, read.engine.max_n, read.engine.prefix_caching), (1, 3, false));
        assert_eq!(read.model.served_model_name, ["a", "b"]);
        let read = typed(&file, &[("PORT", "2"), ("MAX_BEST_OF", "")]).unwrap();
        assert_eq!((read.network.port, read.engine.max_n), (2, 3));
        let read = typed(&[&file[..], &["--port", "4", "--max-best-of", "5"]].concat(), &[("PORT", "2")]).unwrap();
        assert_eq!((read.network.port, read.engine.max_n), (4, 5));
        let read = typed(&[&["serve"], &file[..]].concat(), &[("PORT", "2")]).unwrap();
        assert_eq!((read.network.port, read.engine.max_stop_sequences), (2, 7));
        assert!(typed(&[], &[("PORT", "many")]).unwrap_err().contains("--port"));
    }

    #[test]
    fn mistakes_in_the_file_name_their_key() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("settings.toml");
        for (text, want) in [
            ("ports = 1", "`ports` is no flag"),
            ("config = 'x'", "`config` is no flag"),
            ("port = {a = 1}", "`port` must be"),
            ("port", "--config"),
            ("port = 'x'", "--port"),
        ] {
            std::fs::write(&file, text).unwrap();
            let error = typed(&["--config", file.to_str().unwrap()], &[]).unwrap_err();
            assert!(error.contains(want), "{text}: {error}");
        }
        assert!(typed(&["--config", "/nonexistent"], &[]).unwrap_err().contains("/nonexistent"));
    }

    #[test]
    fn flags_of_other_servers_are_taken_with_a_notice_or_refused_by_name() {
        let fine = typed(
            &[
                "--sharded",
                "false",
                "--num-shard",
                "1",
                "--trust-remote-code",
                "--enforce-eager",
                "--tensor-parallel-size=1",
            ],
            &[],
        );
        assert_eq!(fine.unwrap().notices.len(), 5);
        assert!(typed(&["--port", "1"], &[]).unwrap().notices.is_empty());
        for (flags, want) in [
            (&["--num-shard", "2"][..], "--num-shard 2:"),
            (&["--tensor-parallel-size=4"], "--tensor-parallel-size 4:"),
            (&["--ngrok"], "--ngrok:"),
            (&["--speculative-tokens", "3"], "--speculative-tokens 3:"),
            (&["--quantize", "bitsandbytes"], "--quantize bitsandbytes:"),
            (&["--max-num-seq", "3"], "--max-num-seqs"),
        ] {
            let error = typed(flags, &[]).unwrap_err();
            assert!(error.contains(want), "{flags:?}: {error}");
        }
        assert!(!typed(&["--no-enable-prefix-caching"], &[]).unwrap().engine.prefix_caching);
        assert!(typed(&["--prefix-caching", "false", "--enable-prefix-caching"], &[]).unwrap().engine.prefix_caching);
        let served = typed(&["serve", "org/model", "--port", "9"], &[]).unwrap();
        assert_eq!((served.model.model_id, served.network.port), (Some(PathBuf::from("org/model")), 9));
    }

    #[test]
    fn settings_show_values_and_cover_secrets() {
        let read =
            typed(&["--api-key", "hunter2", "--admin-key", "hunter2", "--max-n", "3", "--adapter", "a=b/c"], &[])
                .unwrap();
        let text = read.settings.to_string();
        assert!(!text.contains("hunter2"), "{text}");
        assert_eq!(
            (&read.settings["api-key"], &read.settings["max-n"]),
            (&serde_json::json!(["***"]), &serde_json::json!(3))
        );
        assert_eq!(
            (&read.settings["adapter"], &read.settings["threads"]),
            (&serde_json::json!(["a=b/c"]), &Value::Null)
        );
        assert_eq!(read.settings["port"], 8000);
    }
}
